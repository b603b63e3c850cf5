"""`mmit`: thin commands over the Python API. Heavy imports happen inside a command, so that --help is instant."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmit.config import Config, ConfigError, dump_config, load_config
from mmit.data.sample import SampleError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Multimodal instruction tuning: a vision encoder, a projector and a causal LLM, trained exactly and resumably.",
)

Run = Annotated[Path, typer.Argument(help="A run directory, or its final/ folder.")]
ConfigFile = Annotated[Path, typer.Argument(help="A YAML recipe; see configs/README.md.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, such as stages.sft.batch_size=8")]


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Run a recipe, or go on with it: the same command resumes after any interruption."""
    from mmit import api

    final = api.train(config, tuple(overrides or ()))
    typer.echo(f"done: {final}\n  mmit generate {final.parent} --prompt '...'" + "  (--image FILE to show a picture)")


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


def main() -> None:
    """The entry point: faults of the user end in one message and exit code 2, of the data in 3, an interruption in 75."""
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
            _stop(str(error), 75)
        raise


def _stop(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code) if code == 75 else sys.exit(code)
