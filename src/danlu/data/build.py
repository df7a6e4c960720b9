"""`danlu data build`: read, clean, deduplicate, split, and write a corpus.

Files are read and cleaned once, into a scratch file; of each document only a signature stays in memory. Then copies
are found, the kept documents are split, and the scratch file is read again in a shuffled order to write the shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from danlu import config as configs
from danlu import console, files
from danlu.data.boilerplate import RepeatedLines
from danlu.data.chunking import Structure, chunks
from danlu.data.cleaning import Cleaner, Limits
from danlu.data.config import DataConfig
from danlu.data.corpus import ErrorPolicy, Source, SourceFile, find_sources, fingerprint
from danlu.data.dedup import Deduplicator, Duplicates
from danlu.data.folder import DataFolder, Document, ShardWriter
from danlu.data.readers import ReaderOptions, read_records
from danlu.data.split import choose_heldout, unit_hash
from danlu.data.spool import Spool, Spooled
from danlu.errors import DanluError
from danlu.formats.card import Input, Stage, card_if_any

VERB = "data build"


def build_data(config: DataConfig) -> DataFolder:
    """Make a data folder; return at once when it holds this very result already.

    The same files and config give the same bytes. Nothing is left in the output folder when anything goes wrong.

    Raises:
        DanluError: no document can be read or is left after cleaning; a file is broken (see ``on_error``); the corpus
            is too small to split; the output folder cannot be written or holds something else.
    """
    config = configs.validate(config)
    on_error = ErrorPolicy(config.on_error)
    sources = find_sources(config.corpus, config.include, config.exclude, on_error)
    n_bytes = sum(_size(file) for source in sources for file in source.files)
    files.require_space(config.out, 2 * n_bytes, "building")
    stage = Stage.open(
        config.out, kind="data", verb=VERB, config=config, inputs=_inputs(sources), overwrite=config.overwrite
    )
    if stage.finished:
        console.note(f"{config.out} is up to date")
        return DataFolder(config.out)
    with _nothing_left_behind(stage), Spool(config.out) as spool:
        metrics, details = _fill(config, stage, sources, n_bytes, spool, on_error)
        stage.finish(metrics, details)
    train, heldout = (
        f"{metrics[f'{split}_documents']:,} documents ({files.human_bytes(metrics[f'{split}_bytes'])})"
        for split in ("train", "heldout")
    )
    console.note(f"{config.out}: {train} for training, {heldout} held out")
    return DataFolder(config.out)


@contextlib.contextmanager
def _nothing_left_behind(stage: Stage) -> Iterator[None]:
    """On any error, and before a run that was killed once is made again, drop the shards; on errors also let go of
    the folder.
    """

    def drop_shards() -> None:
        for shard in stage.out.glob("*.parquet"):  # temporary ones, too: pathlib's * matches leading dots
            shard.unlink()

    drop_shards()
    try:
        yield
    except BaseException as error:
        drop_shards()
        stage.abandon()
        if isinstance(error, OSError):
            raise files.as_user_error(error, stage.out) from error
        raise


def _fill(
    config: DataConfig, stage: Stage, sources: list[Source], n_bytes: int, spool: Spool, on_error: ErrorPolicy
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the shards; return the metrics and details of the card."""
    cleaner = Cleaner(config.filters, config.skip_filters, Limits(config.min_chars, config.languages))
    copies = Deduplicator(near=config.dedup == "near", threshold=config.dedup_threshold)
    read = _read_and_clean(config, sources, n_bytes, cleaner, copies, spool, on_error)
    if not len(spool):
        raise DanluError(_nothing_left(read, cleaner, on_error))

    found = (
        copies.find(lambda index: _plain_text(spool[index])) if config.dedup != "off" else Duplicates.none(len(spool))
    )
    kept = [index for index in range(len(spool)) if found.copy_of[index] == index]
    lines = _count_lines(spool, kept) if "repeated_lines" in cleaner.reports else None
    heldout = choose_heldout(kept, found.group, lambda i: _key(sources, spool[i]), config.heldout, config.seed)

    written = _write(config, stage, sources, spool, kept, heldout, lines, cleaner)
    for split in ("train", *["heldout"][: config.heldout > 0]):
        if not written[split, "documents"]:
            raise DanluError(
                f"no document is left for the {split} split after sampling by weight and dropping repeated lines; "
                "raise the weights, or try --skip-filters repeated_lines"
            )
    metrics = {
        "documents_read": read["documents"],
        "documents_kept": written["kept", "documents"],
        "bytes_read": read["bytes"],
        "bytes_kept": written["kept", "bytes"],
        "train_documents": written["train", "documents"],
        "train_rows": written["train", "rows"],
        "train_bytes": written["train", "bytes"],
        "heldout_documents": written["heldout", "documents"],
        "heldout_rows": written["heldout", "rows"],
        "heldout_bytes": written["heldout", "bytes"],
        "errors_skipped": on_error.count,
    }
    details = {
        "filters": [report.to_dict() for report in cleaner.reports.values()],
        "sources": [
            {
                "name": source.name,
                "entry": source.entry,
                "weight": source.weight,
                "files": len(source.files),
                "ignored": source.ignored,
                "documents_read": read[source.name, "documents"],
                "bytes_read": read[source.name, "bytes"],
                "documents_kept": written[source.name, "documents"],
                "train_documents": written[source.name, "train"],
                "heldout_documents": written[source.name, "heldout"],
            }
            for source in sources
        ],
        "dedup": {
            "method": config.dedup,
            "threshold": config.dedup_threshold,
            "exact_removed": found.n_exact,
            "near_removed": found.n_near,
            "groups": len({int(found.group[index]) for index in kept}),
            "samples": [
                {"documents": [_key(sources, spool[index]) for index in pair], "similarity": round(alike, 4)}
                for *pair, alike in found.pairs
            ],
        },
        "errors": on_error.messages,
    }
    return metrics, details


def _read_and_clean(
    config: DataConfig,
    sources: list[Source],
    n_bytes: int,
    cleaner: Cleaner,
    copies: Deduplicator,
    spool: Spool,
    on_error: ErrorPolicy,
) -> Counter[Any]:
    """Fill the spool and the deduplicator with what is left after cleaning; count what was read, in all and per
    source.
    """
    options = ReaderOptions(config.encoding, config.text_field, config.separator, config.text_type)
    read: Counter[Any] = Counter()
    with console.progress("Reading and cleaning", total=n_bytes, unit="bytes") as advance:
        for number, source in enumerate(sources):
            for file in source.files:
                for record in read_records(file, options, on_error):
                    size = len(record.text.encode())
                    read.update(
                        {"documents": 1, "bytes": size, (source.name, "documents"): 1, (source.name, "bytes"): size}
                    )
                    item = Spooled(number, file.name, record)
                    text = cleaner.clean(record.text, record.type, _key(sources, item))
                    if text is None:
                        continue
                    record.text = text
                    copies.add(_plain_text(item))
                    spool.append(item)
                advance(_size(file))
    return read


def _count_lines(spool: Spool, kept: list[int]) -> RepeatedLines:
    """Lines of the kept prose: counted behind deduplication, lest every line of a document with many copies counts as
    boilerplate.
    """
    lines = RepeatedLines()
    for index in kept:
        record = spool[index].record
        if record.type == "prose":
            lines.add(record.text)
    return lines


def _write(
    config: DataConfig,
    stage: Stage,
    sources: list[Source],
    spool: Spool,
    kept: list[int],
    heldout: set[int],
    lines: RepeatedLines | None,
    cleaner: Cleaner,
) -> Counter[Any]:
    """Write the shards in a shuffled order, and count. A source of weight w comes by w times, a round at a time."""
    written: Counter[Any] = Counter()
    shard_bytes = config.shard_mb << 20
    todo = list(kept)
    random.Random(config.seed).shuffle(todo)
    with (
        ShardWriter(stage.out, "train", shard_bytes) as train,
        ShardWriter(stage.out, "heldout", shard_bytes) as held,
        console.progress("Writing", unit="documents") as advance,
    ):
        number = 0
        while todo:
            again = []
            for index in todo:
                item = spool[index]
                source, record = sources[item.source], item.record
                key = _key(sources, item)
                if lines is not None and record.type == "prose":
                    before = record.text
                    text = cleaner.after_repeated_lines(before, lines.strip_from(before), key, report=number == 0)
                    if text is None:
                        continue
                    record.text = text
                weight = 1.0 if index in heldout else source.weight
                times = math.floor(weight) + (unit_hash(config.seed, "weight", key) < weight % 1)
                if number == 0:
                    written["kept", "documents"] += 1
                    written["kept", "bytes"] += len(record.text.encode())
                    written[source.name, "documents"] += 1
                if times <= number:
                    continue
                if times > number + 1:
                    again.append(index)
                writer = held if index in heldout else train
                for document in _documents(config, source, item, key, number):
                    writer.write(document)
                written[writer.split, "documents"] += 1
                written[source.name, writer.split] += 1
                advance()
            todo, number = again, number + 1
    for writer in (train, held):
        written[writer.split, "rows"] = writer.n_documents
        written[writer.split, "bytes"] = writer.n_bytes
    return written


def _documents(config: DataConfig, source: Source, item: Spooled, key: str, repeat: int) -> Iterator[Document]:
    """The rows of one document: the document itself, or its chunks."""
    record = item.record
    meta = {**record.meta, "type": record.type}
    if record.row is not None:
        meta["row"] = str(record.row)
    if record.type == "chat":
        pieces = [record.text]
    else:
        pieces = chunks(record.text, config.max_chars, _structure(item.path))
    for number, text in enumerate(pieces, start=1):
        chunk = f"#{number}" if len(pieces) > 1 else ""
        if chunk:
            meta = {**meta, "chunk": f"{number}/{len(pieces)}"}
        yield Document(
            id=key + chunk + (f"@{repeat + 1}" if repeat else ""),
            text=text,
            source=source.name,
            path=item.path,
            kind="chat" if record.type == "chat" else "text",
            meta=meta,
        )


def _structure(path: str) -> Structure:
    suffixes = {suffix.lower() for suffix in PurePosixPath(path).suffixes}
    if suffixes & {".py", ".pyi", ".pyx"}:
        return "python"
    return "markdown" if suffixes & {".md", ".markdown"} else "plain"


def _key(sources: list[Source], item: Spooled) -> str:
    """A name for a document that is the same in every run: source/path, and the row in files of rows."""
    return f"{sources[item.source].name}/{item.path}" + (f":{item.record.row}" if item.record.row is not None else "")


def _plain_text(item: Spooled) -> str:
    """What is compared between documents: of a chat what is said, not the JSON around it."""
    if item.record.type != "chat":
        return item.record.text
    return "\n".join(message["content"] for message in json.loads(item.record.text)["messages"])


def _inputs(sources: list[Source]) -> dict[str, Input]:
    """One input per source, with the card of a folder that danlu made."""
    found = {}
    for source in sources:
        folder = Path(source.entry)
        card = card_if_any(folder) if folder.is_dir() else None
        content = {key: value for key, value in dataclasses.asdict(card).items() if key != "files"} if card else None
        role = f"corpus {source.name}"
        found[role] = Input(role, source.entry, fingerprint(source), content)
    return found


def _nothing_left(read: Counter[Any], cleaner: Cleaner, on_error: ErrorPolicy) -> str:
    if not read["documents"]:
        reasons = "".join(f"\n  - {message}" for message in on_error.messages[:5])
        return f"the corpus holds no documents; {on_error.count} errors were skipped:{reasons}"
    reports = [report for report in cleaner.reports.values() if report.documents_removed]
    by = ", ".join(f"{report.name} {report.documents_removed}" for report in reports)
    sample = reports[0].samples[0]
    return (
        f"nothing is left of the corpus: all {read['documents']} documents were removed by cleaning ({by}); "
        f"{sample['path']} was {sample['after']}; lower --min-chars or leave filters out with --skip-filters"
    )


def _size(file: SourceFile) -> int:
    try:
        return file.path.stat().st_size
    except OSError:
        return 0
