"""Options of `danlu serve`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from danlu.config import option
from danlu.engine.engine_config import EngineConfig

DATA_HELP = "Folder of the server's database (conversations, usage); none: the server folder of danlu's cache."
KEYS_HELP = "File of the API keys that `danlu keys create` makes; none: keys.json in the data folder, if it is there."


@dataclass(frozen=True, kw_only=True)
class ServeConfig(EngineConfig):
    """What `danlu serve` takes. The options of the engine hold for each model."""

    model: tuple[str, ...] = option(
        ("smollm2",),
        "Models to serve: a model folder, a GGUF file or a name that `danlu pull` knows, each on its own or as "
        "name=model. The first is loaded at once, others when they are asked for.",
        positional=True,
    )
    adapter: tuple[str, ...] = option(
        (),
        "LoRA adapters to serve beside their models, folders in PEFT's layout, each as MODEL:NAME=folder, or as "
        "NAME=folder for the first model. Requests name them MODEL:NAME; each is loaded when it is first asked for.",
    )
    kv_memory: int | None = option(
        1024,
        "Memory of a model's KV cache; it also bounds the longest conversation. None: kv_share of what there is.",
        unit="MiB",
        ge=1,
    )
    kv_reserve: bool = option(
        True, "Take the memory of the KV cache when a model is loaded, so that a server does not grow."
    )
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    data: Path | None = option(None, DATA_HELP)
    api_key_file: Path | None = option(None, KEYS_HELP)
    public_without_keys: bool = option(
        False,
        "Listen on other than loopback addresses although there are no keys: whoever reaches the port may use it.",
    )
    page: bool = option(True, "Serve the chat page at /.")
    cors_origin: tuple[str, ...] = option((), "Origins whose pages may call the API from a browser, as https://host.")
    model_memory: int | None = option(
        None,
        "Memory that loaded models may take together; a model that was not used for longest is unloaded for another. "
        "None: 80% of the machine's.",
        unit="MiB",
        ge=1,
    )
    max_queue: int = option(256, "Answers that may wait for a model; more are refused with 429.", ge=0)
    deadline: float = option(600.0, "A request that takes longer is ended.", unit="seconds", gt=0)
    drain: float = option(30.0, "After SIGTERM, time that running requests have to end.", unit="seconds", ge=0)
    max_body: int = option(4, "Largest body of a request.", unit="MiB", ge=1, le=1024)
    header_timeout: float = option(
        10.0, "A client that takes longer to send a request is cut off.", unit="seconds", gt=0
    )
    max_connections: int = option(1024, "Connections at the same time; more are refused with 503.", ge=1)
    log_format: Literal["text", "json"] = option("text", "Logs for people, or a JSON object a line.")
    log_prompts: bool = option(False, "Logs also tell what was asked and answered.")
    traces: str | None = option(None, "OpenTelemetry collector that gets traces (OTLP over HTTP), as http://host:4318.")

    def problems(self) -> list[str]:
        """Those of the engine; also, two models of one name, and origins that are none."""
        found = EngineConfig.problems(self)
        names = list(named_models(self.model))
        if not self.model:
            found.append("model: is empty; name a model, such as smollm2")
        if len(names) < len(self.model):
            found.append("model: two models have the same name; give them as name=model")
        found += [f"model: {text!r} names no model" for text in self.model if not all(_split(text))]
        found += self._adapter_problems(names)
        for origin in self.cors_origin:
            if not origin.startswith(("http://", "https://")) or origin.count("/") > 2:
                found.append(f"cors_origin: {origin!r} is no origin; write it as https://host or https://host:port")
        return found

    def _adapter_problems(self, models: list[str]) -> list[str]:
        found, taken = [], set(models)
        for text in self.adapter:
            one = _adapter(text, models)
            if not (one.folder and one.name.rpartition(":")[2]):
                found.append(f"adapter: {text!r} is no adapter; write it as NAME=folder or MODEL:NAME=folder")
            elif one.parent not in models:
                found.append(f"adapter: {text!r} is for a model {one.parent!r}, and none of this name is served")
            elif one.name in taken:
                found.append(f"adapter: {one.name!r} is named twice")
            taken.add(one.name)
        return found


class NamedAdapter(NamedTuple):
    """An adapter that is served: its name for clients, MODEL:NAME, that of its model, and where it is."""

    name: str
    parent: str
    folder: str


def named_adapters(config: ServeConfig) -> list[NamedAdapter]:
    """The adapters of a server."""
    models = list(named_models(config.model))
    return [_adapter(text, models) for text in config.adapter]


def _adapter(text: str, models: list[str]) -> NamedAdapter:
    name, _, folder = text.partition("=")
    parent, colon, own = name.rpartition(":")
    if not colon:
        parent = models[0] if models else ""
    return NamedAdapter(f"{parent}:{own}", parent, folder)


def named_models(texts: tuple[str, ...]) -> dict[str, str]:
    """Models as they were given -> {the name that clients use: where it is}."""
    return dict(map(_split, texts))


def _split(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not equals or name.startswith(("/", ".", "~")) or Path(text).exists():  # a path may hold an equals sign
        name, source = Path(text).name.removesuffix(".gguf") if "/" in text else text, text
    return name, source


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
