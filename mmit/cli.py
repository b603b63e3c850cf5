"""`mmit`: thin commands over the Python API. Heavy imports happen inside a command, so that --help is instant."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from mmit.config import Config, ConfigError, dump_config, load_config
from mmit.data.sample import SampleError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Multimodal instruction tuning: a vision encoder, a projector and a causal LLM, trained exactly.",
)

Run = Annotated[Path, typer.Argument(help="A run directory, or its final/ folder.")]
ConfigFile = Annotated[Path, typer.Argument(help="A YAML recipe; see configs/README.md.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, such as stages.sft.batch_size=8")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    check_memory: Annotated[bool, typer.Option("--check-memory", help="Compute the longest step first.")] = False,
) -> None:
    """Run a recipe, or go on with it: the same command resumes after any interruption."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        for number in numbers:
            signal.signal(number, _leave)  # until the run listens itself there is nothing to save
    else:
        # Other ranks would wait for one that left; the run takes up what arrives now once it listens.
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    from mmit import api

    final = api.train(config, tuple(overrides or ()), check_memory=check_memory)
    typer.echo(f"done: {final}\n  mmit generate {final.parent} --prompt '...'" + "  (--image FILE to show a picture)")


@app.command()
def replay(folder: Annotated[Path, typer.Argument(help="A fault-step-N/ that a run has left.")]) -> None:
    """Repeat the step whose loss or gradient was not finite, and name what is not finite in it."""
    from mmit import api

    for line in api.replay(folder):
        typer.echo(line)


@app.command()
def config(
    file: Annotated[Path | None, typer.Argument(help="A YAML recipe.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a config instead.")] = False,
) -> None:
    """Check a recipe and print it in full, defaults included."""
    if schema:
        typer.echo(json.dumps(Config.model_json_schema(), indent=1))
        return
    if file is None:
        raise ConfigError("mmit config: name a YAML file, or use --schema")
    from mmit import api

    resolved = load_config(file, overrides or ())
    api.check_formats(resolved)
    typer.echo(dump_config(resolved), nl=False)
    for line in api.notes(resolved):
        typer.echo(f"# {line}")


@app.command()
def generate(
    run: Run,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to show before the prompt; repeatable.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="Ask all lines of a file: objects with messages or prompt.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the lines of --jsonl go, each with its answer.")] = None,
    system: Annotated[str | None, typer.Option(help="A system text, where a conversation has none.")] = None,
    max_new_tokens: int = 256,
    temperature: Annotated[float, typer.Option(help="0: the likeliest answer; more: drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this total probability.")] = 1.0,
    seed: int = 0,
    batch_size: Annotated[int, typer.Option(help="Lines of --jsonl that are answered at a time.")] = 8,
) -> None:
    """Ask a finished run: one prompt, or a file of them (the same command goes on with it after an interruption)."""
    if (prompt is None) == (jsonl is None):
        raise ConfigError(
            "mmit generate: write either --prompt 'What is this?' (and --image FILE to show a picture), "
            "or --jsonl IN --out OUT"
        )
    if (jsonl is None) != (out is None) or (jsonl is not None and image):
        raise ConfigError("mmit generate: --jsonl goes with --out and names its pictures itself; --image with --prompt")
    for file in image or ():
        if not file.is_file():
            raise ConfigError(f"--image {file}: no such file; name a picture")
    from mmit.inference.conversation import conversation
    from mmit.inference.generate import Sampling, load

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    model = load(run)
    for note in model.notes:
        typer.echo(note, err=True)
    if prompt is not None:
        asked = conversation(prompt, image or (), system=system)
        typer.echo(model.chat.decode(model.generate([asked], sampling)[0]))
        return
    assert jsonl is not None
    assert out is not None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mmit.inference.jsonl import answer_file

    screen = Console(stderr=True)
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task("answers", total=None)
        before, done = answer_file(
            model,
            jsonl,
            out,
            sampling=sampling,
            batch_size=batch_size,
            system=system,
            progress=lambda answered, total: bar.update(task, completed=answered, total=total),
        )
    typer.echo(f"{out}: {done} answers" + (f", {before} of them from before" if before else ""), err=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for parts, shards, the run and the pictures.")] = Path(
        "mmit-demo"
    ),
    overrides: Overrides = None,
) -> None:
    """Watch a small real model learn to see: 10 minutes on two cores, no account, no GPU."""
    from mmit.demo import demo

    demo(out, overrides or ())


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="The folder to write; it appears whole and verified, or not at all.")],
    format: Annotated[str, typer.Option("--format", help="transformers, gguf, or mmit for what has no twin.")] = (
        "transformers"
    ),
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    adapter: Annotated[bool, typer.Option("--adapter", help="Keep the LoRA as a peft adapter in OUT/adapter.")] = False,
    push: Annotated[str | None, typer.Option("--push", help="Upload to this Hub repository: OWNER/NAME.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everyone see a repository made by --push.")] = False,
) -> None:
    """Hand a finished run to transformers: written, loaded again, and compared token by token."""
    from mmit.export import write

    if push is not None:
        write.check_push(push)
    done = write.export(
        run,
        out,
        format=write.format_named(format),
        dtype=write.dtype_named(dtype),
        adapter=adapter,
        repository=push,
    )
    typer.echo(f"{done.folder}: {done.parity.sentence()}")
    if push is not None:
        typer.echo(write.push(done.folder, push, private=not public))


@app.command()
def merge(
    run: Run,
    out: Annotated[Path, typer.Argument(help="The folder to write, which every command takes as a run.")],
) -> None:
    """Add the LoRA of a finished run into the weights beside it, and check that the answers stay the same."""
    from mmit.export.write import merge

    done = merge(run, out)
    typer.echo(f"{done.folder}: {done.parity.sentence()}")


QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
"""Switches by which dependencies stop telling their makers about us; who has set one otherwise keeps that."""


def main() -> None:
    """The entry point. A fault of the user ends in one message and exit code 2, of the data 3, an interruption 75."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        _stop(str(error), 2)
    except SampleError as error:
        _stop(str(error), 3)
    except FloatingPointError as error:
        _stop(str(error), 3)
    except Exception as error:
        if type(error).__name__ == "Interrupted":
            # torchrun would start a failed rank again; the note PREEMPTED in the run directory says what happened.
            _stop(str(error), 0 if "TORCHELASTIC_RUN_ID" in os.environ else 75)
        raise


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped before the run began; nothing is lost\n")
    os._exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else 75)


def _stop(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code) if code in (0, 75) else sys.exit(code)
