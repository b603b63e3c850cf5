"""`mmit-data`: other people's data -> shards, and ways to look at shards. Heavy imports wait until a command runs."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from data_tools.quality.subset import Derived

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Convert data sets into shards, and look at them. `mmit-data formats` lists what can be read.",
)

USER_FAULT, DATA_FAULT, INTERRUPTED = 2, 3, 130
RESUMABLE = ("convert", "merge", "filter", "dedup", "decontaminate", "scan")


@app.command()
def convert(
    format: Annotated[str, typer.Argument(help="Format name, `auto`, or package.module:function of your own.")],
    input: Annotated[Path, typer.Argument(help="File or folder to read.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    images: Annotated[Path | None, typer.Option(help="Folder below which all pictures lie.")] = None,
    set: Annotated[list[str] | None, typer.Option(help="Option of the format, KEY=VALUE; may be repeated.")] = None,
    source: Annotated[str | None, typer.Option(help="Name of the data in samples and metrics.")] = None,
    on_missing: Annotated[str, typer.Option(help="Missing pictures: error, drop or text-only.")] = "error",
    on_bad: Annotated[str, typer.Option(help="Bad rows: error (after writing the others) or drop.")] = "error",
    decode: Annotated[bool, typer.Option(help="Decode every picture once, as the trainer will.")] = True,
    keep_metadata: Annotated[bool, typer.Option(help="Copy pictures byte for byte, EXIF and all.")] = False,
    window: Annotated[str | None, typer.Option(help="Values of 16-bit pictures shown black,white.")] = None,
    prints: Annotated[bool, typer.Option("--prints", help="Keep a perceptual hash of every picture.")] = False,
    license: Annotated[str | None, typer.Option(help="Licence of the data, carried to the model card.")] = None,
    rows_per_shard: Annotated[int, typer.Option(help="Input rows that one shard covers.")] = 1000,
    processes: Annotated[int | None, typer.Option(help="Worker processes; default: all CPUs.")] = None,
    part: Annotated[str | None, typer.Option(help="i/n: only this share of the shards, for `merge`.")] = None,
) -> None:
    """Convert a data set into shards."""
    import gc

    from data_tools.convert import Settings, conversion, losses
    from data_tools.convert import convert as convert_input
    from data_tools.workers import cpus

    gc.freeze()  # the libraries' objects stay; looking through them again and again took a fifth of the time

    if format == "auto":
        from data_tools.detect import detect, first_rows

        format = detect(input)
        print(f"{input} reads as {format}. Its first rows:")
        for line in first_rows(format, input, images, _options(set or [])):
            print(line)
    settings = Settings(
        source=source,
        on_missing=on_missing,  # type: ignore[arg-type]
        on_bad=on_bad,  # type: ignore[arg-type]
        decode=decode,
        keep_metadata=keep_metadata,
        window=_pair(window),
        prints=prints,
        license=license,
        rows_per_shard=rows_per_shard,
    )

    before = conversion(out) is not None and (out / "index.json").exists()
    with _counted("{:,} rows read, {:,} converted, {:,} rejected") as progress:
        shards = convert_input(
            format,
            input,
            images,
            out,
            options=_options(set or []),
            settings=settings,
            processes=cpus() if processes is None else processes,
            part=_part(part),
            progress=progress,
        )
    summary = conversion(out) or {}
    if before:
        print(f"{out} was converted before, so nothing is read again; remove it if pictures have changed since")
    print(f"{out}: {len(shards)} samples in {len(shards.shard_names)} shards from {summary.get('rows')} rows")
    for line in losses(out):
        print(line)
    print(f"Look at them: mmit-data show {out}")


@app.command()
def show(
    shards: Annotated[str, typer.Argument(help="Folder of shards, or its address (s3://, https://, ...).")],
    index: Annotated[int, typer.Option(help="Which sample, counted from 0.")] = 0,
    count: Annotated[int, typer.Option(help="How many samples from there.")] = 1,
    run: Annotated[Path | None, typer.Option(help="Config or run folder: its tokenizer and chat format.")] = None,
    stage: Annotated[str | None, typer.Option(help="Stage of the config whose chat format to use.")] = None,
    language: Annotated[str | None, typer.Option(help="Tokenizer: hub name, folder, or `bytes`.")] = None,
    chat: Annotated[str, typer.Option(help="Chat format, with --language.")] = "auto",
    image_tokens: Annotated[int, typer.Option(help="Tokens per picture, with --language.")] = 16,
    html: Annotated[Path | None, typer.Option(help="Write a page with the pictures instead.")] = None,
) -> None:
    """Show samples; with a tokenizer, every token coloured by role and by whether it is trained."""
    from data_tools.show import page
    from data_tools.show import show as show_samples

    if html is not None:
        page(
            shards,
            html,
            index=index,
            count=count,
            run=run,
            stage=stage,
            language=language,
            chat=chat,
            image_tokens=image_tokens,
        )
        print(f"{html} written")
        return

    show_samples(
        shards,
        index=index,
        count=count,
        run=run,
        stage=stage,
        language=language,
        chat=chat,
        image_tokens=image_tokens,
    )


@app.command()
def detect(
    input: Annotated[Path, typer.Argument(help="File or folder.")],
    images: Annotated[Path | None, typer.Option(help="Folder below which all pictures lie.")] = None,
    set: Annotated[list[str] | None, typer.Option(help="Option of the format, KEY=VALUE; may be repeated.")] = None,
) -> None:
    """Tell the format of an input and show its first three rows as they are read."""
    from data_tools.detect import detect as detect_format
    from data_tools.detect import first_rows

    format = detect_format(input)
    print(f"{input} reads as {format}:")
    for line in first_rows(format, input, images, _options(set or [])):
        print(line)


@app.command()
def merge(
    shards: Annotated[list[Path], typer.Argument(help="Folders of shards: all parts of a conversion, or any sets.")],
    out: Annotated[Path, typer.Option(help="Folder for the joined set.")],
) -> None:
    """Join shard sets; parts made by `convert --part i/n` give the bytes of one run."""
    from data_tools.merge import merge as merge_sets

    joined = merge_sets(shards, out)
    print(f"{out}: {len(joined)} samples in {len(joined.shard_names)} shards")


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(help="Folder of webdataset tars.")],
    prompt: Annotated[str, typer.Option(help="What is asked about a picture with a caption only.")] = (
        "Describe the image."
    ),
    source: Annotated[str | None, typer.Option(help="Name of the data in samples and metrics.")] = None,
    strip: Annotated[bool, typer.Option(help="Strip whitespace at the edges of messages.")] = True,
    decode: Annotated[bool, typer.Option(help="Decode every picture once, as the trainer will.")] = True,
    on_bad: Annotated[str, typer.Option(help="Bad samples: error (after indexing the others) or drop.")] = "error",
    processes: Annotated[int | None, typer.Option(help="Worker processes; default: all CPUs.")] = None,
) -> None:
    """Index other people's webdataset tars where they lie, so that a config can name the folder as shards."""
    from data_tools.index import index as index_tars
    from data_tools.workers import cpus

    with _counted("{} of {} tars") as progress:
        shards = index_tars(
            folder,
            prompt=prompt,
            strip=strip,
            decode=decode,
            source=source,
            on_bad=on_bad,
            processes=cpus() if processes is None else processes,
            progress=progress,
        )
    print(f"{folder}: {len(shards)} samples in {len(shards.shard_names)} tars; look at them: mmit-data show {folder}")


@app.command()
def verify(
    shards: Annotated[Path, typer.Argument(help="Folder of shards.")],
    most: Annotated[int, typer.Option(min=1, help="How many faults to list.")] = 100,
) -> None:
    """Check every hash, member and picture of a shard set; exit 3 with a list if something is wrong."""
    from itertools import islice

    from mmit.data.shards import ShardSet
    from mmit.data.shards import verify as faults_of

    if not shards.is_dir():
        from mmit.config import ConfigError

        raise ConfigError(f"{shards}: no such folder; name a folder of shards")
    faults = list(islice(faults_of(shards), most))
    for fault in faults:
        print(fault)
    if faults:
        print(
            f"mmit-data: {len(faults)}{' or more' if len(faults) == most else ''} faults in {shards}", file=sys.stderr
        )
        sys.exit(DATA_FAULT)
    print(f"{shards}: {len(ShardSet(shards))} samples, no fault")


@app.command()
def stats(
    shards: Annotated[list[str], typer.Argument(help="FOLDER or FOLDER=REPEAT, as `repeat` in a config.")],
    html: Annotated[Path | None, typer.Option(help="Also write a page with pictures.")] = None,
    language: Annotated[
        str | None, typer.Option(help="Tokenizer to count tokens with: name, folder or `bytes`.")
    ] = None,
    chat: Annotated[str, typer.Option(help="Chat format, with --language.")] = "auto",
    image_tokens: Annotated[int, typer.Option(min=1, help="Tokens per picture.")] = 576,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest sample, and size of a packed row.")] = 2048,
    most: Annotated[int, typer.Option(min=1, help="Read at most this many samples, drawn by a fixed seed.")] = 20000,
) -> None:
    """Count turns, pictures, sizes and tokens, of each set and of an epoch over all; with --html, as a page."""
    from data_tools.finished import write_whole
    from data_tools.stats import epoch, measure, report, summary

    found = measure(shards, language=language, chat=chat, image_tokens=image_tokens, max_tokens=max_tokens, most=most)
    for one in found:
        if len(found) > 1:
            print(one.folder)
        for name, value in summary(one, max_tokens=max_tokens):
            print(f"{name:<24} {value}")
    if len(found) > 1:
        for row in epoch(found):
            print(f"{row[0]:<24}", *(f"{cell:>14}" for cell in row[1:]))
    if html is not None:
        write_whole(html, report(found, max_tokens=max_tokens))
        print(f"{html} written")


@app.command()
def grid(
    shards: Annotated[str, typer.Argument(help="Folder of shards, or its address (s3://, https://, ...).")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("grid.png"),
    count: Annotated[int, typer.Option(min=1, max=500, help="How many samples.")] = 24,
    columns: Annotated[int, typer.Option(min=1, max=50, help="How many side by side.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Which samples are drawn.")] = 0,
) -> None:
    """Lay pictures with their questions and answers out on one page (PNG)."""
    from data_tools.grid import grid as lay_out

    laid_out, notice = lay_out(shards, out, count=count, columns=columns, seed=seed)
    print(f"{out}: {laid_out} samples{f'; {notice}' if notice else ''}")


@app.command()
def mix(
    sources: Annotated[list[str], typer.Argument(help="FOLDER or FOLDER=REPEAT, as `repeat` in a config.")],
) -> None:
    """Preview what an epoch over weighted sources holds."""
    from data_tools.mix import mix as shares_of
    from data_tools.mix import table

    print("\n".join(table(shares_of(sources))))


@app.command()
def formats() -> None:
    """List the formats that can be converted."""
    from data_tools.formats import FORMATS

    width = max(len(name) for name in FORMATS)
    for name, format in FORMATS.items():
        print(f"{name:<{width}}  {format.about}")


@app.command()
def filter(
    shards: Annotated[Path, typer.Argument(help="Folder of shards.")],
    out: Annotated[Path, typer.Option(help="Folder for the samples that stay.")],
    least_characters: Annotated[int | None, typer.Option(help="Of all texts of a sample together.")] = None,
    most_characters: Annotated[int | None, typer.Option(help="Of all texts of a sample together.")] = None,
    least_answer: Annotated[int | None, typer.Option(help="Characters of every trained answer.")] = None,
    most_answer: Annotated[int | None, typer.Option(help="Characters of every trained answer.")] = None,
    least_turns: Annotated[int | None, typer.Option(help="Answers of the assistant.")] = None,
    most_turns: Annotated[int | None, typer.Option(help="Answers of the assistant.")] = None,
    user: Annotated[str | None, typer.Option(help="Regular expression that a text of the user must hold.")] = None,
    not_user: Annotated[str | None, typer.Option(help="Regular expression that none may hold.")] = None,
    assistant: Annotated[str | None, typer.Option(help="As --user, for the assistant.")] = None,
    not_assistant: Annotated[str | None, typer.Option(help="As --not-user, for the assistant.")] = None,
    least_side: Annotated[int | None, typer.Option(help="Pixels of the shorter side of every picture.")] = None,
    most_side: Annotated[int | None, typer.Option(help="Pixels of the longer side of every picture.")] = None,
    most_aspect: Annotated[float | None, typer.Option(help="Longer side through shorter, of every picture.")] = None,
    no_refusals: Annotated[bool, typer.Option("--no-refusals", help="Leave out answers that refuse.")] = False,
    language: Annotated[list[str] | None, typer.Option(help="Code such as en; may be repeated.")] = None,
) -> None:
    """Leave out samples by length, turns, wording, language, picture size or refusal."""
    from data_tools.quality.filter import Rules, filter_set

    rules = Rules(
        least_characters=least_characters,
        most_characters=most_characters,
        least_answer=least_answer,
        most_answer=most_answer,
        least_turns=least_turns,
        most_turns=most_turns,
        user=user,
        not_user=not_user,
        assistant=assistant,
        not_assistant=not_assistant,
        least_side=least_side,
        most_side=most_side,
        most_aspect=most_aspect,
        no_refusals=no_refusals,
        languages=tuple(language or ()),
    )
    with _watched() as progress:
        derived = filter_set(shards, out, rules, progress=progress)
    _tell(out, derived)


@app.command()
def dedup(
    shards: Annotated[Path, typer.Argument(help="Folder of shards.")],
    out: Annotated[Path, typer.Option(help="Folder for the samples that stay.")],
    by: Annotated[str, typer.Option(help="What must be the same: conversation, prompt or pictures.")] = "conversation",
    near: Annotated[float | None, typer.Option(help="Share of word triples that near texts have in common.")] = None,
    alike: Annotated[int | None, typer.Option(help="Bits of 64 in which pictures that look alike may differ.")] = None,
) -> None:
    """Leave out samples that repeat an earlier one, exactly or nearly."""
    from data_tools.quality.dedup import dedup as dedup_set

    with _watched() as progress:
        derived = dedup_set(shards, out, by=by, near=near, alike=alike, progress=progress)  # type: ignore[arg-type]
    _tell(out, derived)


@app.command()
def decontaminate(
    shards: Annotated[Path, typer.Argument(help="Folder of shards.")],
    against: Annotated[list[Path] | None, typer.Option(help="Shards of an evaluation set; may be repeated.")] = None,
    report: Annotated[Path, typer.Option(help="File for the matches, a line each.")] = Path("decontamination.jsonl"),
    words: Annotated[int, typer.Option(help="Words in a row that are no accident.")] = 13,
    covered: Annotated[float, typer.Option(help="Mark samples that hold this share of an item's prompt.")] = 0.5,
    alike: Annotated[int | None, typer.Option(help="Bits of 64 in which pictures that look alike may differ.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Write the set without what is marked, to --out.")] = False,
    reviewed: Annotated[bool, typer.Option("--reviewed", help="Apply the report as it lies there, edited.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the samples that stay, with --apply.")] = None,
) -> None:
    """Report samples that hold texts or pictures of evaluation sets; remove them only with --apply."""
    from data_tools.quality.decontaminate import apply as apply_report
    from data_tools.quality.decontaminate import survey, table
    from mmit.config import ConfigError

    if apply != (out is not None):
        raise ConfigError("--apply and --out OUT belong together: a report alone needs neither")
    if reviewed and not apply:
        raise ConfigError("--reviewed applies a report that was looked at; add --apply --out OUT")
    if reviewed == bool(against):
        raise ConfigError("name the shards of evaluation sets with --against, or apply a report with --reviewed")
    with _watched() as progress:
        if against:
            found = survey(
                shards, against, report, words_in_common=words, covered=covered, alike=alike, progress=progress
            )
            print("\n".join(table(found)))
            print(f"every match: {report}" + ("" if apply else "; nothing was removed"))
        if out is not None:
            _tell(out, apply_report(shards, report, out, progress=progress))


@app.command()
def scan(
    shards: Annotated[Path, typer.Argument(help="Folder of shards.")],
    report: Annotated[Path | None, typer.Option(help="File for a line a value: where, type, masked.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the samples in which nothing was found.")] = None,
) -> None:
    """Count e-mail addresses, phone and card numbers and keys in the texts; values are never shown."""
    from data_tools.quality.scan import scan as scan_set
    from data_tools.quality.scan import without

    with _watched() as progress:
        found = scan_set(shards, report, progress=progress)
        print(f"{'type':<8} {'values':>10} {'samples':>10}")
        for type, count in found.values.items():
            print(f"{type:<8} {count:>10,} {found.affected[type]:>10,}")
        print(f"{found.any:,} of {found.samples:,} samples hold any" + (f"; listed in {report}" if report else ""))
        if out is not None:
            _tell(out, without(shards, out, progress=progress))


@contextmanager
def _counted(text: str) -> Iterator[Callable[..., None] | None]:
    """A line on the terminal that is written over and over; None where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        yield lambda *numbers: print("\r" + text.format(*numbers), end="", file=sys.stderr, flush=True)
    finally:
        print(file=sys.stderr)


@contextmanager
def _watched() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on the terminal for each thing that is done; nothing where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:

        def progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = shown.add_task(what, total=total)
            shown.update(bars[what], completed=done)

        yield progress


def _tell(out: Path, derived: Derived) -> None:
    left, removed = len(derived.shards), sum(derived.removed.values())
    print(f"{out}: {left:,} of {derived.samples:,} samples stay, {removed:,} left out", end="")
    print(f" ({', '.join(f'{reason} {count:,}' for reason, count in derived.removed.items())})" if removed else "")
    if removed:
        print(f"Which and why: {out / 'removed.jsonl'}")


def _options(pairs: list[str]) -> dict[str, Any]:
    import yaml

    from mmit.config import ConfigError, read_value

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: write KEY=VALUE, such as --set strip=false")
        try:
            options[key.replace("-", "_")] = read_value(value) if value else ""
        except (yaml.YAMLError, ValueError, RecursionError):
            options[key.replace("-", "_")] = value
    return options


def _pair(text: str | None) -> tuple[float, float] | None:
    from mmit.config import ConfigError

    if text is None:
        return None
    try:
        low, high = (float(value) for value in text.strip("[]").split(","))
    except ValueError:
        raise ConfigError(f"--window {text}: write BLACK,WHITE, such as --window 0,4095") from None
    return low, high


def _part(text: str | None) -> tuple[int, int] | None:
    from mmit.config import ConfigError

    if text is None:
        return None
    try:
        i, n = (int(value) for value in text.split("/"))
    except ValueError:
        raise ConfigError(f"--part {text}: write i/n, such as --part 1/4") from None
    return i, n


def main() -> None:
    """The command, its faults told in a line each: exit 2 for the user's input, 3 for the data."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal lacks a letter of the data
    try:
        app()
    except ValueError as error:
        from mmit.config import ConfigError
        from mmit.data.sample import SampleError

        if not isinstance(error, ConfigError | SampleError):
            raise
        print(f"mmit-data: {error}", file=sys.stderr)
        sys.exit(USER_FAULT if isinstance(error, ConfigError) else DATA_FAULT)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            goes_on = len(sys.argv) > 1 and sys.argv[1] in RESUMABLE
            print(f"mmit-data: interrupted{'; the same command goes on where it stopped' * goes_on}", file=sys.stderr)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` closed the pipe: no fault of ours
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room and give the same command again" if full else "check the path and its permissions"
        print(f"mmit-data: {place}{error.strerror or error}; {remedy}", file=sys.stderr)
        sys.exit(USER_FAULT)


if __name__ == "__main__":
    main()
