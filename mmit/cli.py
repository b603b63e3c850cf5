"""`mmit`: thin commands over the Python API. Heavy imports happen inside a command, so that --help is instant."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import signal
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from mmit.config import Config, ConfigError, dump_config, load_config, recipes
from mmit.data.sample import SampleError

TINY = Path("configs/tiny.yaml") if Path("configs/tiny.yaml").is_file() else recipes() / "tiny.yaml"
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Multimodal instruction tuning: a vision encoder, a projector and a causal LLM, trained exactly.",
    epilog="\n\n".join(
        (
            "To begin with:",
            "  mmit demo   -- a real small model learns to see, 10 minutes on two cores",
            f"  mmit train {TINY}   -- the whole machine in a minute, nothing to download",
            "  mmit generate runs/tiny --prompt 'What is it?'   -- ask what was trained",
            f"  mmit config {TINY}   -- a recipe in full; copy one from its folder",
            "  mmit-data --help   -- your own data: convert it, look at it, check it",
        )
    ),
)

Run = Annotated[Path, typer.Argument(help="A run directory, or its final/ folder.")]
ConfigFile = Annotated[Path, typer.Argument(help="A YAML recipe; see configs/README.md.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, such as stages.sft.batch_size=8")]


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(" ".join(f"{name} {version(name)}" for name in ("mmit", "torch", "transformers")))
        raise typer.Exit


@app.callback()
def _options(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    del wanted  # the callback has told it


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
    from data_tools.workers import cpus
    from mmit import api

    final = api.train(config, overrides or (), check_memory=check_memory, processes=cpus())
    if os.environ.get("RANK", "0") != "0":
        return  # on another node, whose view of the folder may be behind
    sees = json.loads((final / "model.json").read_text(encoding="utf-8"))["image_tokens"] > 0
    run = shlex.quote(str(final.parent))
    typer.echo(f"done: {final}\n  mmit generate {run}" + (" --image FILE" if sees else "") + " --prompt '...'")


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
    api.check_names(resolved)
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
    max_new_tokens: Annotated[int, typer.Option(help="An answer is cut after so many.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: the likeliest answer; more: drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws, with --temperature.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Lines of --jsonl that are answered at a time.")] = 8,
) -> None:
    """Ask a finished run: one prompt, or a file of them (the same command goes on with it after an interruption).

    Texts lose the whitespace at their edges, as converted data does: the ids are then those of training.
    """
    if (prompt is None) == (jsonl is None):
        raise ConfigError(
            "mmit generate: write either --prompt 'What is this?' (and --image FILE to show a picture), "
            "or --jsonl IN --out OUT"
        )
    if (jsonl is None) != (out is None) or (jsonl is not None and image):
        raise ConfigError("mmit generate: --jsonl goes with --out and names its pictures itself; --image with --prompt")
    for file in image or ():
        if not file.is_file():
            if str(file).startswith(("http:", "https:")):
                raise ConfigError(f"--image {file}: nothing is fetched; download the picture and name its file")
            raise ConfigError(f"--image {file}: {'is a folder' if file.is_dir() else 'no such file'}; name a picture")
    from mmit.inference.conversation import conversation
    from mmit.inference.generate import Sampling, load
    from mmit.inference.jsonl import answer_file, read_lines

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    pictured = [prompt] if image else []
    if jsonl is not None:  # a fault in it is told before the model is loaded
        records = [line.record for line in read_lines(jsonl)]
        pictured = [record.get("prompt") for record in records if record.get("image") or record.get("images")]
    if any(isinstance(text, str) and "<image>" in text for text in pictured):
        typer.echo("note: <image> in a prompt is a word; the pictures are shown before it without one", err=True)
    model = load(run)
    for note in model.notes:
        typer.echo(note, err=True)
    if prompt is not None:
        asked = conversation(prompt, image or (), system=system)
        answer = model.chat.decode(model.generate([asked], sampling)[0])
        typer.echo(answer)
        if not answer.strip():
            typer.echo("(an empty answer: the model ended it at once)", err=True)
        return
    assert jsonl is not None
    assert out is not None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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


ENVIRONMENT = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
}
"""What a file system refuses because of what the user named or has, and not because of a fault of ours."""


class CtrlC(BaseException):
    """KeyboardInterrupt, of which the command line library would make exit code 1, a bug."""


def main() -> None:
    """The entry point. A fault of the user ends in one message and exit code 2, of the data 3, an interruption 75."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # no run ends because a terminal lacks a letter of its data
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _ctrl_c)
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        _stop(str(error), 2)
    except SampleError as error:
        _stop(str(error), 3)
    except FloatingPointError as error:
        _stop(str(error), 3)
    except CtrlC:
        _stop("stopped; the same command goes on where it can, or starts anew", 75)
    except OSError as error:
        if type(error).__name__ == "OtherRankFailed":
            _stop(str(error), 1)
        if error.errno not in ENVIRONMENT:
            raise
        named = error.filename if error.filename is not None else "a file"
        _stop(f"{named}: {error.strerror}; name another place, or mend its rights or free some space", 2)
    except BaseException as error:
        if type(error).__name__ == "Interrupted":
            # torchrun would start a failed rank again; the note PREEMPTED in the run directory says what happened.
            _stop(str(error), 0 if "TORCHELASTIC_RUN_ID" in os.environ else 75)
        raise


def _ctrl_c(number: int, frame: FrameType | None) -> None:
    raise CtrlC


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped before the run began; nothing is lost\n")
    os._exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else 75)


def _stop(message: str, code: int) -> None:
    with suppress(OSError):  # on a full disk the code has to tell
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code) if code in (0, 75) else sys.exit(code)
