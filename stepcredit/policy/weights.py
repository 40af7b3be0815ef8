"""Reading the weights of a model, and whether all of them were there.

transformers gives what a checkpoint lacks random values and goes on. Here that is an error, with the names and the
likely cause; what a checkpoint has beyond the model is a warning. Of tied weights one is enough.
"""

import json
import logging
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from stepcredit.errors import UserError

log = logging.getLogger("stepcredit")

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MODEL_WEIGHTS = ("model*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
SHOWN = 3  # names in a message
POINTER = b"version https://git-lfs"
# What transformers, peft and safetensors raise for files that they cannot read.
UNREADABLE = (
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # old checkpoints have them; the model computes its own
MADE_BY = {  # parts of names that tell how a checkpoint was written
    "base_layer": "it was saved with adapters inside; merge them first (merge_and_unload of peft), then save",
    "qweight": "it is quantised (GPTQ, AWQ) and config.json does not say so; give the model in full precision",
    "weight_scale": "it is quantised and config.json does not say so; give the model in full precision",
    "absmax": "it is quantised (bitsandbytes) and config.json does not say so; give the model in full precision",
}
OUTPUT = "lm_head.weight"
TWO_MODELS = "weights and config.json are of two models, or weights are missing; copy or download the folder again"


@dataclass(frozen=True)
class Names:
    """How the names of the weights that were read differ from those of a model.

    Attributes:
        missing: the model has them, what was read does not.
        unexpected: what was read has them, the model does not.
        mismatched: with the shape that was read and that of the model.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @classmethod
    def of_loading(cls, info: Mapping[str, Any]) -> "Names":
        """From the loading info of transformers."""
        unexpected = [name for name in info["unexpected_keys"] if not COMPUTED.search(name)]
        sizes = [(name, tuple(read), tuple(own)) for name, read, own in info["mismatched_keys"]]
        return cls(_ordered(info["missing_keys"]), _ordered(unexpected), sorted(sizes))

    @classmethod
    def between(cls, read: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> "Names":
        """From the tensors themselves."""
        sizes = [
            (name, tuple(read[name].shape), tuple(value.shape))
            for name, value in model.items()
            if name in read and read[name].shape != value.shape
        ]
        return cls(_ordered(model.keys() - read.keys()), _ordered(read.keys() - model.keys()), sorted(sizes))

    def check(self, where: str, total: int, remedy: str = TWO_MODELS, architecture: str = "") -> None:
        """Log what is unexpected.

        Args:
            where: begins the message, such as "model: 'my-folder'".
            total: weights of the model.
            remedy: what to do where the names do not tell the cause.
            architecture: the class that the checkpoint is of, if it is not the model's.

        Raises:
            UserError: weights are missing or of another size.
        """
        if self.missing:
            cause = self._cause(architecture) or remedy
            lacking = f"{len(self.missing)} of {_counted(total)} ({_some(self.missing)})"
            raise UserError(f"{where} lacks {lacking}; {cause}")
        if self.mismatched:
            shown = _some([f"{name}: {list(read)}, not {list(own)}" for name, read, own in self.mismatched])
            raise UserError(f"{where} has {_counted(len(self.mismatched))} of another size ({shown}); {remedy}")
        if self.unexpected:
            cause = self._cause(architecture)
            log.warning(
                "%s has %s that the model does not take (%s); left out%s",
                where,
                _counted(len(self.unexpected)),
                _some(self.unexpected),
                f"; {cause}" if cause else "",
            )

    def _cause(self, architecture: str) -> str:
        """What the names tell about how the checkpoint was written; "" for nothing."""
        for part, cause in MADE_BY.items():
            if any(part in name for name in self.unexpected):
                return cause
        more, less = _prefixes(self.missing, self.unexpected), _prefixes(self.unexpected, self.missing)
        if more:
            return (
                f"its names begin with '{more}', which a wrapper has added (DDP, torch.compile, another model); "
                "save the model inside the wrapper, or take the prefix off the names"
            )
        if less:
            return f"its names lack the '{less}' that the model's begin with; save the whole model, not a part of it"
        if architecture:
            return f"config.json names {architecture}, which is another class; give a causal language model"
        if self.missing == [OUTPUT]:
            return (
                "it may be a model without output layer; where that layer shares the embedding's weights, config.json "
                'must say "tie_word_embeddings": true'
            )
        return ""


def _ordered(names: Iterable[str]) -> list[str]:
    """By name, layer 2 before layer 10."""
    return sorted(names, key=lambda name: [part.zfill(8) if part.isdigit() else part for part in name.split(".")])


def _counted(number: int) -> str:
    return f"{number} weight" + ("" if number == 1 else "s")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _prefixes(names: Sequence[str], longer: Sequence[str]) -> str:
    """What most of `longer` have in front of a name of `names`; "" where that is not so."""
    wanted, found = set(names), Counter[str]()
    for name in longer:
        for end in (match.end() for match in re.finditer(r"\.", name)):
            if name[end:] in wanted:
                found[name[:end]] += 1
    if not found:
        return ""
    prefix, count = found.most_common(1)[0]
    return prefix if 2 * count > min(len(names), len(longer)) else ""


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: naming the first tensor that has one.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and value.numel() and not value.is_meta:
            extremes = torch.stack(value.detach().float().aminmax())  # NaN if there is one
            if not bool(extremes.isfinite().all()):
                raise UserError(
                    f"{where} has NaN or infinity in {name}; it is damaged, or comes from a run that diverged or a "
                    "conversion that overflowed; take another checkpoint"
                )


def load_network(
    source: str, option: str = "model", kind: Any = AutoModelForCausalLM, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model with fp32 weights from a folder or a hub id, adapters on their base included; all weights were there.

    Args:
        option: that named it, for messages.
        kind: the class whose `from_pretrained` loads it.

    Raises:
        UserError: it cannot be read, lacks weights, or has some of another size or that are not finite.
    """
    where = f"{option}: '{source}'"
    base = adapter_base(source, option)
    if base is None:
        network = _read(source, where, kind, trust_remote_code)
    else:
        network = _read(base, f"{option}: '{base}', the base of the adapters in '{source}',", kind, trust_remote_code)
        _read_adapters(network, source, where, base)
    check_finite(network.state_dict(), where)
    return network


def _read(source: str, where: str, kind: Any, trust_remote_code: bool) -> PreTrainedModel:
    try:
        network, info = kind.from_pretrained(
            source,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the info
        )
    except UNREADABLE as error:
        raise UserError(f"{where} cannot be loaded ({why_unreadable(source, error)})") from error
    named = network.config.architectures or []
    other = ", ".join(name for name in named if name != type(network).__name__)
    Names.of_loading(info).check(where, len(network.state_dict()), architecture=other)
    return network


def _read_adapters(network: PreTrainedModel, source: str, where: str, base: str) -> None:
    try:
        info = network.load_adapter(source, ignore_mismatched_sizes=True, dtype=torch.float32)
    except UNREADABLE as error:
        raise UserError(f"{where} cannot be loaded onto '{base}' ({why_unreadable(source, error)})") from error
    total = sum(".default." in name for name in network.state_dict())
    check_adapters(Names.of_loading(info.to_dict()), where, total, base)


def check_adapters(names: Names, where: str, total: int, base: str) -> None:
    """Refuse adapters that are not wholly those of the base: what is left over belongs to layers that it has not.

    Raises:
        UserError: they lack weights, have some of another size, or more than fit.
    """
    remedy = f"they were made for another model than '{base}', or with other --lora options"
    if names.unexpected and not names.missing and not names.mismatched:
        raise UserError(
            f"{where} has {len(names.unexpected)} adapter weights for layers that are not there "
            f"({_some(names.unexpected)}); {remedy}"
        )
    names.check(where, total, remedy)


def adapter_base(source: str, option: str = "model") -> str | None:
    """The model that the adapters of a folder or hub id belong to; None where there are none.

    Raises:
        UserError: there is a whole model beside them, or they do not name their base.
    """
    folder = Path(source)
    try:
        file = find_adapter_config_file(source)
    except UNREADABLE:
        return None  # loading says why it cannot be reached
    if file is None:
        return None
    if any(any(folder.glob(pattern)) for pattern in MODEL_WEIGHTS):
        raise UserError(
            f"{option}: folder '{source}' holds adapters ({ADAPTER}) and a whole model; move away the one that is not "
            "meant, or give the model alone"
        )
    try:
        base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (AttributeError, OSError, ValueError) as error:
        raise UserError(f"{option}: {ADAPTER} of '{source}' cannot be read ({error})") from error
    if not base:
        raise UserError(
            f"{option}: {ADAPTER} of '{source}' does not name the model that the adapters belong to; write it there as "
            "base_model_name_or_path"
        )
    return str(base)


def why_unreadable(source: str, error: Exception) -> str:
    """In one line why a model cannot be loaded: what is wrong with its files, else what the error says first."""
    folder = Path(source)
    if folder.is_dir():
        return next((why for file in sorted(folder.iterdir()) if (why := _broken(file))), first_line(error))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return "there is no folder of this name"
    return (
        f"there is no folder of this name, and as a hub id: {first_line(error)}. Check the spelling, and the network "
        "if it was not loaded before"
    )


def _broken(file: Path) -> str:
    """What is wrong with a file of a model, as far as it can be told without loading it; "" for nothing."""
    if file.suffix not in (".safetensors", ".bin", ".json") or not file.is_file():
        return ""
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            return f"{file.name} is a pointer of git-lfs, not the file itself; run 'git lfs pull' there"
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
    except (SafetensorError, ValueError) as broken:
        return f"{file.name} is damaged or cut off: {broken}; copy or download it again"
    return ""


def first_line(error: Exception) -> str:
    """The first line of an error that says what is wrong; where none does, its kind too."""
    first, *rest = str(error).strip().splitlines() or [""]
    if first.startswith("Error(s) in loading state_dict") and rest:
        first = rest[0].strip()
    line = first.rstrip(".:")
    return line if line and not isinstance(error, (AttributeError, LookupError, TypeError)) else repr(error)
