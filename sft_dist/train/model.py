"""The model of a run, in the resolved type, agreeing with the tokenizer on its special tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config.schema import ModelConfig
from sft_dist.data.hub import work_from_cache
from sft_dist.errors import PreflightError
from sft_dist.files import read_json
from sft_dist.train.adapter import nf4
from sft_dist.train.pretrained import resolve_model
from sft_dist.train.ranks import Ranks
from sft_dist.train.tokenizer import RunTokenizer, grow_embeddings, missing_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def find_model(model: ModelConfig) -> None:
    """Raise PreflightError unless the model's config and weight files are here or on the Hub; loads no weights."""
    from transformers import AutoConfig

    source = resolve_model(model.name)
    try:
        AutoConfig.from_pretrained(source, revision=model.revision, trust_remote_code=model.trust_remote_code)
        if Path(source).is_dir() and not [*Path(source).glob("*.safetensors"), *Path(source).glob("*.bin")]:
            raise OSError("no *.safetensors in it")
    except (OSError, ValueError, ImportError) as error:
        raise missing_model(model, source, "model", error) from None


def fetch_model(model: ModelConfig) -> None:
    """Bring the model's weights to where nodes without a network find them: the local cache of the Hub.

    Raises PreflightError that names what is missing, of a local directory's files, too.
    """
    from huggingface_hub import snapshot_download

    def fetched(*patterns: str) -> Path:
        # What transformers reads stands at the top; below may be the same weights in other forms.
        folder = snapshot_download(
            source, revision=model.revision, allow_patterns=list(patterns), ignore_patterns="*/*"
        )
        return Path(folder)

    source = resolve_model(model.name)
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = fetched("*.safetensors", "*.json", "*.py")
            if not [*folder.glob("*.safetensors*")]:
                folder = fetched("*.bin")
        except Exception as error:
            # A dozen kinds: no network, offline mode, gated, unknown name or revision, no space.
            raise missing_model(model, source, "model", error) from None
    missing = missing_weights(folder)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise PreflightError(
            f"model.name is {model.name!r}, but of its weights {', '.join(missing[:3])}{more} is not in {folder}",
            hint="nodes fetch nothing: complete it here, where there is a network, with `hf download NAME` (same HF_HOME)",
        )


def missing_weights(folder: Path) -> list[str]:
    """Names of the weight files that a model's folder should hold by its index, or by custom, and does not."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        listed = read_json(folder / index)
        if listed is not None:
            return sorted(name for name in set(listed["weight_map"].values()) if not (folder / name).is_file())
    there = [path for ending in ("safetensors", "bin") for path in folder.glob(f"*.{ending}") if path.is_file()]
    return [] if there else ["model.safetensors"]


def load_model(
    model: ModelConfig, tokens: RunTokenizer, dtype: str, attn_implementation: str, ranks: Ranks | None = None
) -> PreTrainedModel:
    """The causal language model that `model` names, its weights in `dtype`, or in 4 bits where its `lora` says so.

    Under ZeRO-3 and, among `ranks`, under FSDP2 the main process reads the weights and every process gets its share; else
    every process reads them all. Embeddings grow if tokens were added. Raises PreflightError if there is no such
    model here.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_fsdp_enabled

    source = resolve_model(model.name)
    in_4_bits = model.lora is not None and model.lora.quantization == "nf4"
    common = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    settings = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}

    def read() -> PreTrainedModel:
        quantization = {"quantization_config": nf4(settings["dtype"])} if in_4_bits else {}
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, **common, **settings, **quantization)
        return loaded

    try:
        if ranks is None or ranks.size == 1 or in_4_bits or not is_fsdp_enabled():
            loaded = read()
        else:
            loaded = _read_by_main(ranks, read, lambda: _without_weights(source, common, settings))
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise missing_model(model, source, "model", error) from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise missing_model(model, source, "model", error) from None
    work_from_cache()  # rows and tokenizer are here already; what asks for the base again, a merge, finds it
    empty = loaded.get_input_embeddings().weight.is_meta
    grow_embeddings(loaded, tokens)
    if empty:
        _give_places(loaded)
    _agree_on_special_tokens(loaded, tokens)
    return loaded


def _read_by_main(
    ranks: Ranks, read: Callable[[], PreTrainedModel], build: Callable[[], PreTrainedModel]
) -> PreTrainedModel:
    """The model as the main process has `read` it; on the others as they `build` it, if its parameters are the same.

    They are not where files hold two weights that the config says are one: only who reads them sees that.
    """
    models: list[PreTrainedModel] = []

    def names(model: PreTrainedModel) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def read_names() -> list[str]:
        models.append(read())
        return names(models[0])

    wanted = ranks.by_main(read_names)
    if ranks.is_main:
        return models[0]
    built = build()
    return built if names(built) == wanted else read()


def _without_weights(source: str, common: dict[str, Any], settings: dict[str, Any]) -> PreTrainedModel:
    """The model with its parameters on torch's meta device: FSDP2 fills them from the main process.

    transformers 5.23 reads the files on every process, although accelerate throws away what all but the main one have read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    config = AutoConfig.from_pretrained(source, **common)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=common["trust_remote_code"], **settings
        )
    # Beside parameters there are buffers that no file holds, and they need their values here: from_pretrained sees to them.
    told = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list every weight as missing
    try:
        built: PreTrainedModel = type(shapes).from_pretrained(None, config=config, state_dict={}, **settings)
    finally:
        logging.set_verbosity(told)
    built.tie_weights()
    return built


def _give_places(model: PreTrainedModel) -> None:
    """Move what is on the meta device to host memory that nobody has written to, so that none is taken.

    accelerate tells the parameters of an optimizer apart by their addresses; on the meta device all are 0.
    """
    import torch

    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                setattr(module, name, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
    model.tie_weights()


def gather_by_layer(model: PreTrainedModel) -> None:
    """Let ZeRO-3 gather and release a decoder layer as a whole, not each of its parameters by itself.

    Its bookkeeping in Python for each module takes longer than the layers of a small model (benchmarks/README.md).
    """
    from deepspeed.utils import set_z3_leaf_modules

    classes = {type(layer) for layer in decoder_layers(model)}
    if classes:
        set_z3_leaf_modules(model, sorted(classes, key=lambda kind: kind.__name__))


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the forward pass of each decoder layer, for rows of any length.

    One layer after the other and not the model as a whole: every layer is the same code, compiled once; what gathers and
    checkpoints layers stands between them; and the loss is no part of it.
    """
    import torch

    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward, dynamic=True)


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that the model's authors name as those not to split."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _agree_on_special_tokens(model: PreTrainedModel, tokens: RunTokenizer) -> None:
    """Tokenizer, model config and generation config name the same padding and end-of-turn tokens."""
    eos, pad = tokens.tokenizer.eos_token_id, tokens.tokenizer.pad_token_id
    config = model.config.get_text_config()
    config.eos_token_id, config.pad_token_id = eos, pad
    if model.generation_config is not None:
        # Any of several tokens halts generation: ours comes first, the model's own stay.
        own = model.generation_config.eos_token_id
        others = [own] if isinstance(own, int) else list(own or [])
        model.generation_config.eos_token_id = [eos, *(token for token in others if token != eos)]
        model.generation_config.pad_token_id = pad
