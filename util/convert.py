"""Write checkpoints for other projects: `python -m util.convert IN OUT --to FORMAT`.

IN is a path, an address or the name of a released checkpoint. FINETUNE.md lists the formats.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import yaml
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from util import formats
from util.errors import UserError
from util.file_io import make_dirs, write_atomically
from util.formats import DECODER_ARGUMENTS, IMAGENET, Weights, decoder_heads, is_decoder, rename
from util.pos_embed import sincos_pos_embed
from util.video.transforms import MEAN, STD
from util.weights import brief, read_weights, renormalise, some, with_our_normalisation

FORMATS = ("mae_st", "pyslowfast", "pyslowfast-separate", "videomae-hf", "safetensors")


def drop_decoder(weights: Weights) -> Weights:
    """Leave out the decoder."""
    state = {k: v for k, v in weights.state.items() if not is_decoder(k)}
    arguments = {k: v for k, v in weights.arguments.items() if k not in DECODER_ARGUMENTS}
    return replace(weights, state=state, arguments=arguments)


def to_mae_st(weights: Weights) -> dict[str, Any]:
    """Return a checkpoint in the reference implementation's and our own layout.

    Its encoder loads in the reference implementation, and its head if that reads the mean and the
    model has a class token. Only this project reads `arguments`, which rebuild any model.
    """
    arguments = weights.arguments
    sizes = {"num_frames": arguments["num_frames"], "t_patch_size": arguments["t_patch_size"]}
    args = sizes | {"input_size": arguments["img_size"]} | weights.flags
    model = _own_storage(weights.as_stored())
    return {"model": model, "args": args, "arguments": arguments, "classes": weights.classes}


def to_pyslowfast(weights: Weights, separate: bool) -> dict[str, Any]:
    """Return a checkpoint in PySlowFast's layout, with the entries of its `cfg` that load it.

    q, k and v are fused; with `separate`, only the decoder's are. Only this project reads
    `arguments`, which `cfg` cannot express. Raises ValueError when PySlowFast has no such model.
    """
    arguments, reasons = weights.arguments, []
    if arguments.get("pool") == "cls" and not arguments["cls_embed"]:
        reasons.append("its head reads the first patch and PySlowFast's a class token")
    if weights.has_decoder:
        frames, heads = arguments["num_frames"], arguments["decoder_num_heads"]
        if arguments["cls_embed"] and not arguments["cls_through_decoder"]:
            reasons.append("its decoder has a class token of its own, not the encoder's")
        if heads != decoder_heads(arguments["decoder_embed_dim"], formats.PYSLOWFAST):
            reasons.append(f"its decoder has {heads} heads, not PySlowFast's 64 channels per head")
        if arguments["pred_t_dim"] not in (frames, frames // arguments["t_patch_size"]):
            reasons.append("it predicts neither one nor all frames of a patch")
        elif arguments["pred_t_dim"] < frames and not arguments["strided_targets"]:
            reasons.append("it predicts other frames than the first of every patch")
        if arguments["target"] == "channel" or arguments.get("target_norm"):
            reasons.append("its targets are normalised in another way")
        reasons += _unknown_target(arguments)
    _refuse("PySlowFast", reasons, weights.has_decoder)

    names = {ours: theirs for theirs, ours in formats.PYSLOWFAST_NAMES.items()}
    names["decoder_norm."] = f"pred_head.transforms.0.{arguments.get('decoder_depth')}."
    state = fuse_qkv(weights.as_stored(), "decoder_blocks." if separate else "")
    state = _own_storage({rename(name, names): tensor for name, tensor in state.items()})
    rest = {"layer_norm_eps": arguments["layer_norm_eps"]}
    cfg = _pyslowfast_cfg(weights, separate)
    return {"model_state": state, "cfg": cfg, "arguments": rest, "classes": weights.classes}


def _pyslowfast_cfg(weights: Weights, separate: bool) -> str:
    """Write the entries of PySlowFast's configuration that decide what the model computes."""
    flags = {k: v for k, v in weights.flags.items() if k == "sampling_rate"}
    said, channels = weights.arguments | flags, weights.arguments["in_chans"]
    kernel = [said["t_patch_size"], said["patch_size"], said["patch_size"]]
    same = formats.CFG | formats.CFG_OF_TENSORS | {
        "MODEL.NUM_CLASSES": "num_classes", "MASK.DECODER_SEP_POS_EMBED": "decoder_sep_pos_embed",
        "MVIT.MLP_RATIO": "mlp_ratio", "MVIT.SEP_POS_EMBED": "sep_pos_embed",
        "DATA.SAMPLING_RATE": "sampling_rate",
    }  # fmt: skip
    entries = {entry: said[name] for entry, name in same.items() if name in said} | {
        "DATA.TEST_CROP_SIZE": said["img_size"], "DATA.INPUT_CHANNEL_NUM": [channels],
        "DATA.MEAN": [MEAN] * channels, "DATA.STD": [STD] * channels,
        "MVIT.PATCH_KERNEL": kernel, "MVIT.PATCH_STRIDE": [*kernel], "MVIT.PATCH_PADDING": [0] * 3,
        "MVIT.QKV_BIAS": not said["no_qkv_bias"], "MVIT.SEPARATE_QKV": separate,
        "MVIT.USE_MEAN_POOLING": said.get("pool") != "cls",
    }  # fmt: skip
    if weights.has_decoder:
        entries["MASK.NORM_PRED_PIXEL"] = said["target"] == "patch"
        entries["MASK.TIME_STRIDE_LOSS"] = said["pred_t_dim"] < said["num_frames"]
    cfg: dict[str, dict[str, Any]] = {}
    for entry, value in entries.items():
        section, name = entry.split(".")
        cfg.setdefault(section, {})[name] = value
    return yaml.safe_dump(cfg)


def to_videomae_hf(weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return tensors, config.json and preprocessor_config.json of a Hugging Face VideoMAE.

    Key biases are left out: they add the same number to all attention scores of a query, which
    softmax ignores. Raises ValueError when VideoMAE has no such model.
    """
    arguments, state = weights.arguments, weights.as_stored()
    reasons = ["VideoMAE has no class token"] if arguments["cls_embed"] else []
    widths = {"pos_embed": "embed_dim", "decoder_pos_embed": "decoder_embed_dim"}
    for name, width in ((k, arguments[v]) for k, v in widths.items() if v in arguments):
        table = sincos_pos_embed(math.prod(formats.token_grid(arguments)), width)[None]
        found, tolerance = state.pop(name, torch.empty(0)).float(), weights.rounding(name)
        is_table = found.shape == table.shape
        if not is_table or not torch.allclose(found, table, rtol=0, atol=max(1e-5, tolerance)):
            reasons.append(f"its {name} is not VideoMAE's joint fixed sine-cosine table")
    if weights.has_decoder:
        if arguments["pred_t_dim"] != arguments["num_frames"]:
            reasons.append("it predicts some of the frames of a patch and VideoMAE predicts all")
        if arguments["target"] == "patch":
            reasons.append("its targets are normalised over all channels and VideoMAE's in each")
        if arguments["target"] == "pixels" and arguments["in_chans"] != 3:
            reasons.append("it predicts other colours than red, green and blue")
        reasons += _unknown_target(arguments)
        if state.pop("decoder_embed.bias").any():
            reasons.append("VideoMAE's decoder_embed has no bias")
        if arguments["no_qkv_bias"] != ("decoder_blocks.0.attn.q.bias" not in state):
            reasons.append("its encoder and decoder do not both have biases of q and v")
    _refuse("VideoMAE", reasons, weights.has_decoder)
    names = {"norm.": "fc_norm." if arguments.get("pool") == "mean" else "videomae.layernorm."}
    encoder = ("embeddings.", "encoder.")
    for theirs, ours in formats.HF_NAMES.items():
        names[ours] = f"videomae.{theirs}" if theirs.startswith(encoder) else theirs
    renamed = {rename(k, names): v for k, v in state.items() if not k.endswith(".attn.k.bias")}
    return renamed, *_hf_configs(weights)


def _hf_configs(weights: Weights) -> tuple[dict[str, Any], dict[str, Any]]:
    arguments, state, size = weights.arguments, weights.state, weights.arguments["img_size"]
    has_bias, table = not arguments["no_qkv_bias"], formats.HF_CONFIG.items()
    config = {theirs: arguments[ours] for theirs, ours in table if ours in arguments} | {
        "architectures": ["VideoMAEModel"], "model_type": "videomae", "hidden_act": "gelu",
        "intermediate_size": len(state[formats.FC1]),
        "qkv_bias": has_bias, "qv_bias": has_bias,  # its names in older and newer versions
        "use_mean_pooling": arguments.get("pool") == "mean" or "norm.weight" not in state,
    }  # fmt: skip
    if weights.has_head:
        labels = weights.classes or [f"LABEL_{i}" for i in range(arguments["num_classes"])]
        config["architectures"] = ["VideoMAEForVideoClassification"]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    if weights.has_decoder:
        config["architectures"] = ["VideoMAEForPreTraining"]
        config["decoder_intermediate_size"] = len(state[f"decoder_{formats.FC1}"])
        config["norm_pix_loss"] = arguments["target"] == "channel"
    preprocessor = {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True, "size": {"shortest_edge": size},
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    }  # fmt: skip
    return config, preprocessor | _normalisation(weights)


def _normalisation(weights: Weights) -> dict[str, Sequence[float]]:
    mean, std = ([value] * weights.arguments["in_chans"] for value in (MEAN, STD))
    return {"image_mean": weights.mean or mean, "image_std": weights.std or std}


def write(weights: Weights, path: str, to: str) -> None:
    """Write a checkpoint in one of FORMATS; path is a folder for videomae-hf, else a file."""
    weights.refuse_doubt()
    is_folder, separate = to == "videomae-hf", to == "pyslowfast-separate"
    arguments, is_theirs = weights.arguments, weights.predicts_unit_pixels
    if not is_folder:
        weights = with_our_normalisation(weights)
    elif arguments.get("target") == "pixels" and arguments["in_chans"] == 3 and not is_theirs:
        weights = renormalise(weights, IMAGENET, ((0,) * 3, (1,) * 3))  # as their loss expects
    if to not in ("videomae-hf", "safetensors"):
        checkpoint = to_mae_st(weights) if to == "mae_st" else to_pyslowfast(weights, separate)
        write_atomically(path, lambda file: torch.save(checkpoint, file))
        return
    state, *configs = to_videomae_hf(weights) if is_folder else (weights.as_stored(),)
    # the header holds what rebuilds the model; transformers needs "format"
    flags = {k: v for k, v in weights.flags.items() if k in ("sampling_rate", "sampling")}
    said = {"arguments": weights.arguments, "classes": weights.classes, "flags": flags}
    said |= _normalisation(weights)
    header = {"format": "pt", formats.METADATA: json.dumps(said)}
    content = safetensors_bytes(_own_storage(state), header)
    if is_folder:
        make_dirs(path)
        for name, config in zip(formats.HF_FILES, configs, strict=True):
            described = json.dumps(config, indent=2).encode()
            write_atomically(os.path.join(path, name), lambda file, d=described: file.write(d))
        path = os.path.join(path, formats.HF_WEIGHTS[0])
    write_atomically(path, lambda file: file.write(content))


def _own_storage(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors: some share memory, and of a view a file would store all that it views."""
    return {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}


def _unknown_target(arguments: dict[str, Any]) -> list[str]:
    target = arguments["target"]
    return [f"its target is {target!r}, not pixels"] if target in ("hog", "motion") else []


def _refuse(project: str, reasons: list[str], has_decoder: bool) -> None:
    if reasons:
        hint = "; --drop_decoder writes the encoder alone" if has_decoder else ""
        raise ValueError(f"{project} cannot express this model: {'; '.join(reasons)}{hint}")


def refuse_incomplete(weights: Weights, to: str) -> None:
    """Raise UserError when a weight of the file's own model is missing or has another shape."""
    # util imports the models only here, for the command line
    from models_mae import MaskedAutoencoderViT
    from models_vit import VisionTransformer

    is_mae = weights.has_decoder
    arguments = weights.autoencoder_arguments() if is_mae else weights.classifier_arguments()
    with torch.device("meta"):
        model = (MaskedAutoencoderViT if is_mae else VisionTransformer)(**arguments).state_dict()
    found = {name: list(tensor.shape) for name, tensor in weights.state.items()}
    optional = () if weights.has_head else ("head.",)
    if to == "videomae-hf" and optional and not found.keys() & {"norm.weight", "norm.bias"}:
        optional = ("head.", "norm.")  # a headless VideoMAE with use_mean_pooling lacks it
    needed = {k: list(v.shape) for k, v in model.items() if not k.startswith(optional)}
    if lacking := [name for name in needed if name not in found]:
        what = f"lacks {len(lacking)} weights of its model ({some(lacking)})"
        raise UserError(f"{weights.path} {what} and its copy would look complete")
    if odd := [f"{k} is {found[k]}, not {v}" for k, v in needed.items() if found[k] != v]:
        raise UserError(f"{weights.path} holds no model known here: {odd[0]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Convert a checkpoint file from the command line."""
    parser = argparse.ArgumentParser("python -m util.convert", description="Convert a checkpoint")
    parser.add_argument("input", metavar="IN", help="path, address or name (k400/vit_large)")
    parser.add_argument("output", metavar="OUT", help="file, or folder for videomae-hf")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    parser.add_argument("--drop_decoder", action="store_true", help="write the encoder alone")
    parser.add_argument("--use_ema", action="store_true", help="write the file's moving average")
    parser.add_argument("--trust", action="store_true", help="run the code that IN asks to run")
    args = parser.parse_args(argv)
    try:
        weights = read_weights(args.input, use_ema=args.use_ema, trust=args.trust)
        weights = drop_decoder(weights) if args.drop_decoder else weights
        refuse_incomplete(weights, args.to)
        write(weights, args.output, args.to)
    except (UserError, ValueError, OSError) as error:
        parser.error(f"{args.input}: {error}" if isinstance(error, ValueError) else str(error))
    count = sum(tensor.numel() for tensor in weights.state.values())
    print(f"{args.input} ({weights.source}, {count:,} parameters) -> {args.output} ({args.to})")
    unused = [f"left out: {some(brief(weights.unused), 20)}"] if weights.unused else []
    for note in [*weights.notes, *unused]:
        print(f"  {note}")


def fuse_qkv(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Join q, k and v of the blocks with this prefix into one qkv, which our_names splits."""
    fused = dict(state)
    for name in [k for k in state if k.startswith(prefix) and ".attn.q." in k]:
        parts = [fused.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        fused[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return fused


if __name__ == "__main__":
    main()
