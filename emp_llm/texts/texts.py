"""The texts that perplexities are quoted on, by name, and any other one.

    wikitext2 | ptb | c4       the data set, from the Hub or its cache
    FILE                       a text as it is; rows of .parquet, .json and .jsonl
    DATASET[:CONFIG[:SPLIT]]   a data set of the Hub

Models are evaluated on the data sets' split ``test``, and calibrated on ``train``.

How rows become one text is part of a protocol. ``paper`` joins them by blank lines, whatever the
data set. ``gptq`` joins them as SparseGPT, Wanda and, with its ``--new-eval``, GPTQ do: WikiText-2
by blank lines, Penn Treebank and C4 by spaces, and it scores 256 windows of C4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

from emp_llm.errors import OptionError
from emp_llm.messages import encodable
from emp_llm.texts.datasets_library import explained

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["NAMES", "Part", "Protocol", "Text", "check_protocol", "dataset_of", "read_text"]

Part = Literal["test", "train"]
Protocol = Literal["paper", "gptq"]

_TEXT_COLUMNS = ("text", "sentence")
_C4_ROWS, _C4_TRAIN_ROWS, _C4_WINDOWS = 1100, 4000, 256
_BLANK_LINE = "\n\n"
_ROW_FILES = {"parquet": (".parquet",), "json": (".json", ".jsonl", ".json.gz", ".jsonl.gz")}
_TEXT_ENDINGS = (".txt", ".text", ".md", ".raw")
_REMEDY = (
    "give a local text, parquet or JSON file instead ({option} FILE), or fetch it once where there "
    "is a network and bring HF_HOME along"
)


@dataclass(frozen=True)
class Text:
    """A text to predict.

    Attributes:
        name: What it is called in tables and in files.
        text: The text itself.
        windows: Windows that are scored at most; None if all are.
    """

    name: str
    text: str
    windows: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A data set that papers quote: what ``load_dataset`` takes, and how GPTQ joins its rows."""

    arguments: Mapping[str, str]
    test: Mapping[str, Any]
    train: Mapping[str, Any]
    gptq_join: str
    gptq_windows: int | None = None

    def rows(self, shown: str, part: Part) -> list[str]:
        return _rows(shown, part, **self.arguments, **(self.test if part == "test" else self.train))


_KNOWN = {
    "wikitext2": _Known(
        arguments={"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
        test={"split": "test"},
        train={"split": "train"},
        gptq_join=_BLANK_LINE,
    ),
    "ptb": _Known(
        # the data set is a script, which `datasets` no longer runs; the Hub has it as parquet
        arguments={"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"},
        test={"data_files": {"test": "penn_treebank/test/0000.parquet"}, "split": "test"},
        train={"data_files": {"train": "penn_treebank/train/0000.parquet"}, "split": "train"},
        gptq_join=" ",
    ),
    "c4": _Known(
        arguments={"path": "allenai/c4"},
        test={
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": f"validation[:{_C4_ROWS}]",
        },
        train={
            "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
            "split": f"train[:{_C4_TRAIN_ROWS}]",
        },
        gptq_join=" ",
        gptq_windows=_C4_WINDOWS,
    ),
}

NAMES = tuple(_KNOWN)


def read_text(name_or_path: str, *, protocol: Protocol, part: Part = "test") -> Text:
    """Read a text by its name.

    Of C4 it is the first 1,100 documents of the first validation shard, as in the papers; to
    calibrate on, the first 4,000 of the first training shard, about 2 million tokens. A local text
    is taken as it is, byte for byte: WikiText-2 as the file that people pass around has a space and
    a line end behind every row, no blank lines between them, and gives another perplexity than the
    data set's rows joined by the protocol.

    Args:
        name_or_path: ``wikitext2``, ``ptb``, ``c4``, a file, or a data set of the Hub, whose
            configuration and split may follow after colons: ``user/name:config:split``.
        protocol: ``paper`` or ``gptq``.
        part: ``test``, to measure on, or ``train``, to calibrate on; what a data set is read of
            whose split is not named. A file has no parts.

    Returns:
        The text, by its short name.

    Raises:
        OptionError: If there is no such text, it is not UTF-8, or it has no column of text.
        HubError: If the data set is not in the cache and the Hub cannot be reached.
    """
    known = _KNOWN.get(name_or_path)
    if known is not None:
        rows = known.rows(name_or_path, part)
        if protocol == "gptq":
            windows = known.gptq_windows if part == "test" else None
            return Text(name_or_path, known.gptq_join.join(rows), windows)
        return Text(name_or_path, _BLANK_LINE.join(rows))
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return _read_file(path, part)
    is_folder = path.is_dir() and name_or_path != ""
    if is_folder or _looks_like_a_file(name_or_path):
        state = "is a folder" if is_folder else "there is no such file"
        raise OptionError(
            f"{name_or_path or repr('')}: {state}; give a text, parquet or JSON file, one of "
            f"{', '.join(NAMES)}, or a data set of the Hub"
        )
    dataset, config, split = _parts(name_or_path)
    rows = _rows(name_or_path, part, path=dataset, name=config, split=split or part)
    return Text(name_or_path, _BLANK_LINE.join(rows))


def dataset_of(name: str) -> str:
    """The Hub's identifier of the data set that a text of this name is from; else the name."""
    if name in _KNOWN:
        return str(_KNOWN[name].arguments["path"])
    return name.partition(":")[0]


def _looks_like_a_file(name: str) -> bool:
    endings = (*_TEXT_ENDINGS, *(ending for kind in _ROW_FILES.values() for ending in kind))
    return name.startswith((".", "/", "~")) or name.endswith(endings) or not name.strip()


def _parts(name: str) -> tuple[str, str | None, str | None]:
    dataset, *rest = name.split(":", 2)  # a split such as train[:100] has colons of its own
    if not dataset or dataset.count("/") > 1:
        raise OptionError(
            f"{name!r} is neither a file nor a data set: give DATASET, DATASET:CONFIG or "
            "DATASET:CONFIG:SPLIT"
        )
    config, split = [*rest, "", ""][:2]
    return dataset, config or None, split or None


def _read_file(path: Path, part: Part) -> Text:
    for kind, endings in _ROW_FILES.items():
        if path.name.lower().endswith(endings):
            # a temporary cache: datasets would keep a copy of the local file in its own
            with TemporaryDirectory(prefix="emp-llm-text-") as cache:
                found = {"data_files": str(path), "split": "train", "cache_dir": cache}
                rows = _rows(str(path), part, path=kind, **found)
            return Text(encodable(path.name), _BLANK_LINE.join(rows))
    try:
        return Text(encodable(path.name), path.read_bytes().decode())
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: is not a text in UTF-8 ({error}); convert it") from error


def _rows(shown: str, part: Part, **arguments: object) -> list[str]:
    option = "--perplexity" if part == "test" else "--calibration"
    with explained(shown, _REMEDY.format(option=option)) as datasets:
        rows = datasets.load_dataset(**arguments, trust_remote_code=False)
        columns = rows.column_names
        for column in _TEXT_COLUMNS:
            if column in columns:
                return [row or "" for row in rows[column]]
    raise OptionError(
        f"{shown}: has the columns {', '.join(columns)}; none of them is "
        f"{' or '.join(_TEXT_COLUMNS)}: rename the one with the text"
    )


def check_protocol(protocol: str) -> None:
    """Check the name of a protocol.

    Raises:
        OptionError: If there is no such protocol.
    """
    if protocol not in get_args(Protocol):
        raise OptionError(
            f"protocol is {protocol!r}; choose one of {', '.join(get_args(Protocol))}"
        )
