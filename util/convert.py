"""Write checkpoints in the formats of this family and its neighbours.

    python -m util.convert IN OUT --to {mae_st,pyslowfast,pyslowfast-fused,videomae-hf,safetensors}

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
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from util import formats
from util.errors import UserError
from util.file_io import make_dirs, write_atomically
from util.formats import DECODER_ARGUMENTS, Weights, is_decoder, num_heads, rename
from util.pos_embed import join, sincos_pos_embed, split
from util.video.transforms import MEAN, STD
from util.weights import fold_output, read_weights, some, with_our_normalisation

FORMATS = ("mae_st", "pyslowfast", "pyslowfast-fused", "videomae-hf", "safetensors")


def drop_decoder(weights: Weights) -> Weights:
    """Leave out the decoder."""
    state = {k: v for k, v in weights.state.items() if not is_decoder(k)}
    arguments = {k: v for k, v in weights.arguments.items() if k not in DECODER_ARGUMENTS}
    return replace(weights, state=state, arguments=arguments)


def to_mae_st(weights: Weights) -> dict[str, Any]:
    """Return a checkpoint in the reference implementation's and our own layout.

    Its encoder and head load in the reference implementation. Only this project reads `arguments`;
    they rebuild the model, even with a decoder that the reference does not have.
    """
    arguments = weights.arguments
    flags = {k: arguments[k] for k in ("num_frames", "t_patch_size")}
    flags |= {"input_size": arguments["img_size"]} | weights.flags
    model = _own_storage(weights.as_stored())
    return {"model": model, "args": flags, "arguments": arguments, "classes": weights.classes}


def to_pyslowfast(weights: Weights, fused: bool) -> dict[str, Any]:
    """Return a checkpoint in PySlowFast's layout: separable positions; q, k, v separate or fused.

    Raises ValueError when PySlowFast has no such model.
    """
    arguments, state, reasons = weights.arguments, weights.as_stored(), []
    cls = arguments["cls_embed"]

    # positions: the encoder's separable, the decoder's joint
    if not arguments["sep_pos_embed"]:
        joint = state.pop("pos_embed")
        if cls:
            state["pos_embed_class"] = joint[:, :1]
        try:
            joint = weights.state["pos_embed"][:, int(cls) :]
            spatial, temporal = split(joint, weights.grid, weights.rounding("pos_embed"))
            state |= {"pos_embed_spatial": spatial, "pos_embed_temporal": temporal}
        except ValueError:
            reasons.append("its joint positions are not a sum of positions in space and in time")
    if arguments.get("decoder_sep_pos_embed"):
        first = [state["decoder_pos_embed_class"]] if cls else []
        parts = [weights.state[f"decoder_pos_embed_{part}"] for part in ("spatial", "temporal")]
        state = {k: v for k, v in state.items() if not k.startswith("decoder_pos_embed_")}
        state["decoder_pos_embed"] = torch.cat([*first, join(*parts)], dim=1)

    # what the tensors do not say; PySlowFast ignores it
    said = arguments | {"sep_pos_embed": True, "sincos_pos_embed": False}
    if weights.has_decoder:
        said["decoder_sep_pos_embed"] = False
        heads = arguments["decoder_num_heads"]
        if cls and not arguments["cls_through_decoder"]:
            reasons.append("its decoder has a class token of its own, not the encoder's")
        if heads != num_heads(arguments["decoder_embed_dim"]):
            reasons.append(f"its decoder has {heads} heads, not PySlowFast's 64 channels per head")
    _refuse("PySlowFast", reasons, weights.has_decoder)

    names = {ours: theirs for theirs, ours in formats.PYSLOWFAST_NAMES.items()}
    names["decoder_norm."] = f"pred_head.transforms.0.{arguments.get('decoder_depth')}."
    state = fuse_qkv(state) if fused else state
    renamed = {rename(name, names): tensor for name, tensor in state.items()}
    return {"model_state": _own_storage(renamed), "arguments": said, "classes": weights.classes}


def to_videomae_hf(weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return tensors, config.json and preprocessor_config.json of a Hugging Face VideoMAE.

    Key biases are left out: they add the same number to all attention scores of a query, which
    softmax ignores. Raises ValueError when VideoMAE has no such model.
    """
    arguments, state = weights.arguments, weights.as_stored()
    reasons = ["it has a class token and VideoMAE has none"] if arguments["cls_embed"] else []
    for name, width in (("pos_embed", "embed_dim"), ("decoder_pos_embed", "decoder_embed_dim")):
        if width not in arguments:
            continue
        table = sincos_pos_embed(math.prod(weights.grid), arguments[width])
        tolerance = max(1e-5, weights.rounding(name))
        if state.pop(name, None) is None or weights.state[name].shape[1:] != table.shape:
            reasons.append(f"its {name} is not joint, but VideoMAE's is a fixed sine-cosine table")
        elif not torch.allclose(weights.state[name][0].float(), table, rtol=0, atol=tolerance):
            reasons.append(f"its {name} is not VideoMAE's fixed sine-cosine table")
    if weights.has_decoder:
        if arguments["pred_t_dim"] != arguments["num_frames"]:
            reasons.append("it predicts some of the frames of a patch and VideoMAE predicts all")
        if not arguments["norm_pix_loss"] and not weights.predicts_unit_pixels:
            per_channel = torch.ones(arguments["in_chans"], dtype=torch.float64)
            state |= fold_output(weights.state, STD * per_channel, MEAN * per_channel)
        if state.pop("decoder_embed.bias").any():
            reasons.append("its decoder_embed has a bias and VideoMAE's has none")
        if arguments["no_qkv_bias"] != ("decoder_blocks.0.attn.q.bias" not in state):
            reasons.append("its encoder and decoder do not both have biases of q and v")
    _refuse("VideoMAE", reasons, weights.has_decoder)
    names = {"norm.": "fc_norm." if weights.has_head else "videomae.layernorm."}
    for theirs, ours in formats.HF_NAMES.items():
        in_encoder = theirs.startswith(("embeddings.", "encoder."))
        names[ours] = f"videomae.{theirs}" if in_encoder else theirs
    renamed = {rename(k, names): v for k, v in state.items() if not k.endswith(".attn.k.bias")}
    return renamed, _hf_config(weights), _hf_preprocessor(weights)


def _hf_config(weights: Weights) -> dict[str, Any]:
    arguments, state = weights.arguments, weights.state
    architecture, has_bias = "VideoMAEModel", not arguments["no_qkv_bias"]
    config = {
        "model_type": "videomae",
        "intermediate_size": len(state[formats.FC1]),
        "hidden_act": "gelu",
        "qkv_bias": has_bias,  # its name in older versions
        "qv_bias": has_bias,
        "use_mean_pooling": weights.has_head or "norm.weight" not in state,
    }
    if weights.has_head:
        architecture = "VideoMAEForVideoClassification"
        labels = weights.classes or [f"LABEL_{i}" for i in range(arguments["num_classes"])]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    if weights.has_decoder:
        architecture = "VideoMAEForPreTraining"
        config["decoder_intermediate_size"] = len(state[f"decoder_{formats.FC1}"])
    table = formats.HF_CONFIG.items()
    config |= {theirs: arguments[ours] for theirs, ours in table if ours in arguments}
    return {"architectures": [architecture]} | config


def _hf_preprocessor(weights: Weights) -> dict[str, Any]:
    size = weights.arguments["img_size"]
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    } | _normalisation(weights)


def _normalisation(weights: Weights) -> dict[str, Sequence[float]]:
    return {"image_mean": weights.mean or (MEAN,) * 3, "image_std": weights.std or (STD,) * 3}


def write(weights: Weights, path: str, to: str) -> None:
    """Write a checkpoint in one of FORMATS; path is a folder for videomae-hf, else a file."""
    weights.refuse_doubt()
    if to != "videomae-hf":  # its config records the normalisation
        weights = with_our_normalisation(weights)
    if to in ("videomae-hf", "safetensors"):
        is_folder = to == "videomae-hf"
        state, *configs = to_videomae_hf(weights) if is_folder else (weights.as_stored(),)
        # the header holds what rebuilds the model; transformers needs "format"
        said = {"arguments": weights.arguments, "classes": weights.classes}
        said = json.dumps(said | _normalisation(weights))
        content = safetensors_bytes(_own_storage(state), {"format": "pt", formats.METADATA: said})
        if is_folder:
            make_dirs(path)
        for name, config in zip(formats.HF_FILES, configs, strict=False):
            described = json.dumps(config, indent=2).encode()
            write_atomically(os.path.join(path, name), lambda file, d=described: file.write(d))
        path = os.path.join(path, formats.HF_WEIGHTS[0]) if is_folder else path
        write_atomically(path, lambda file: file.write(content))
    else:
        is_fused = to == "pyslowfast-fused"
        checkpoint = to_mae_st(weights) if to == "mae_st" else to_pyslowfast(weights, is_fused)
        write_atomically(path, lambda file: torch.save(checkpoint, file))


def _own_storage(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, and views, which a file would store with all they view."""
    own: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        if not whole or storage.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        own[name] = tensor
    return own


def _refuse(project: str, reasons: list[str], has_decoder: bool) -> None:
    if reasons:
        hint = "; --drop_decoder writes the encoder alone" if has_decoder else ""
        raise ValueError(f"{project} cannot express this model: {'; '.join(reasons)}{hint}")


def refuse_incomplete(weights: Weights, to: str) -> None:
    """Raise UserError when the file lacks weights of its own model."""
    # util imports the models only here, for the command line
    from models_mae import MaskedAutoencoderViT
    from models_vit import VisionTransformer

    with torch.device("meta"):
        if weights.has_decoder:
            model = MaskedAutoencoderViT(**weights.autoencoder_arguments())
        else:
            model = VisionTransformer(**weights.classifier_arguments())
    optional = [] if weights.has_head else ["head."]
    if to == "videomae-hf" and not any(name.startswith("norm.") for name in weights.state):
        optional.append("norm.")  # with use_mean_pooling, VideoMAE without a head has none
    needed = [k for k in model.state_dict() if not k.startswith(tuple(optional))]
    if lacking := [k for k in needed if k not in weights.state]:
        raise UserError(
            f"{weights.path} lacks {len(lacking)} weights of its model ({some(lacking)}) "
            "and its copy would look complete"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Convert a checkpoint file from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m util.convert", description="Convert a checkpoint between projects"
    )
    parser.add_argument("input", metavar="IN", help="path, address or name (k400/vit_large)")
    parser.add_argument("output", metavar="OUT", help="file, or folder for videomae-hf")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    parser.add_argument("--drop_decoder", action="store_true", help="write the encoder alone")
    args = parser.parse_args(argv)
    try:
        weights = read_weights(args.input)
        if args.drop_decoder:
            weights = drop_decoder(weights)
        refuse_incomplete(weights, args.to)
        write(weights, args.output, args.to)
    except (UserError, ValueError, OSError) as error:
        parser.error(f"{args.input}: {error}" if isinstance(error, ValueError) else str(error))
    count = sum(tensor.numel() for tensor in weights.state.values())
    print(f"{args.input} ({weights.source}, {count:,} parameters) -> {args.output} ({args.to})")
    for note in [*weights.notes, *(f"left out: {name}" for name in weights.unused)]:
        print(f"  {note}")


def fuse_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join q, k and v of every block into one qkv, which our_names splits."""
    fused = {}
    for name, tensor in state.items():
        if ".attn.q." in name:
            parts = [state[name.replace(".q.", f".{part}.")] for part in "qkv"]
            fused[name.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif ".attn.k." not in name and ".attn.v." not in name:
            fused[name] = tensor
    return fused


if __name__ == "__main__":
    main()
