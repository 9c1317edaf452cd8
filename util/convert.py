"""Write checkpoints in the formats of this family and its neighbours.

    python -m util.convert IN OUT --to {mae_st,pyslowfast,pyslowfast-fused,videomae-hf,safetensors}

IN is a path, an address or the name of a released checkpoint. FINETUNE.md lists the formats.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from util.errors import UserError
from util.file_io import make_dirs, write_atomically
from util.formats import DECODER_ARGUMENTS, METADATA, Weights, is_decoder, num_heads
from util.pos_embed import join, sincos_pos_embed, split
from util.video.transforms import MEAN, STD
from util.weights import fold_output, read_weights, with_our_normalisation

FORMATS = ("mae_st", "pyslowfast", "pyslowfast-fused", "videomae-hf", "safetensors")

# Names of other projects in place of ours, in the order in which they are replaced.
PYSLOWFAST_NAMES = (
    (r"^decoder_blocks\.", "pred_head.transforms.0."),
    (r"^decoder_pred\.", "pred_head.projections.0."),
    (r"^head\.", "head.projection."),
)
VIDEOMAE_NAMES = (
    (r"\.attn\.([qv])\.bias$", r".attention.attention.\1_bias"),
    (r"\.attn\.q\.", ".attention.attention.query."),
    (r"\.attn\.k\.", ".attention.attention.key."),
    (r"\.attn\.v\.", ".attention.attention.value."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"^head\.", "classifier."),
    (r"^patch_embed\.proj\.", "videomae.embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "videomae.encoder.layer."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.", "decoder.head."),
    (r"^decoder_embed\.", "encoder_to_decoder."),
)


def drop_decoder(weights: Weights) -> Weights:
    """Leave out the decoder."""
    state = {k: v for k, v in weights.state.items() if not is_decoder(k)}
    arguments = {k: v for k, v in weights.arguments.items() if k not in DECODER_ARGUMENTS}
    return replace(weights, state=state, arguments=arguments)


def to_mae_st(weights: Weights) -> dict[str, Any]:
    """Return a checkpoint in the reference implementation's and our own layout.

    Its encoder and head load in the reference implementation. `arguments`, which only this project
    reads, rebuild the model, also with decoders that the reference does not have.
    """
    weights = with_our_normalisation(weights)
    arguments = weights.arguments
    flags = {k: arguments[k] for k in ("num_frames", "t_patch_size")}
    flags |= {"input_size": arguments["img_size"]} | weights.flags
    return {"model": _own_storage(weights.as_stored()), "args": flags, "arguments": arguments}


def to_pyslowfast(weights: Weights, fused: bool = False) -> dict[str, Any]:
    """Return a checkpoint in PySlowFast's layout: separable positions; q, k, v separate or fused.

    Raises:
        ValueError: PySlowFast has no such model; the message says why.
    """
    weights = with_our_normalisation(weights)
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
            reasons.append("its joint positions are no sum of positions in space and in time")
    if arguments.get("decoder_sep_pos_embed"):
        first = [state["decoder_pos_embed_class"]] if cls else []
        parts = [weights.state[f"decoder_pos_embed_{part}"] for part in ("spatial", "temporal")]
        state = {k: v for k, v in state.items() if not k.startswith("decoder_pos_embed_")}
        state["decoder_pos_embed"] = torch.cat([*first, join(*parts)], dim=1)

    if weights.has_decoder:
        if cls and not arguments["cls_through_decoder"]:
            reasons.append(
                "its decoder has a class token of its own, PySlowFast's takes the encoder's"
            )
        if arguments["decoder_num_heads"] != num_heads(arguments["decoder_embed_dim"]):
            reasons.append(
                f"its decoder has {arguments['decoder_num_heads']} heads, PySlowFast's has 64 "
                "channels per head"
            )
    _refuse("PySlowFast", reasons, weights.has_decoder)

    # what the tensors do not say; PySlowFast ignores it
    said = arguments | {"sep_pos_embed": True, "sincos_pos_embed": False}
    said |= {"decoder_sep_pos_embed": False} if weights.has_decoder else {}
    norm = (r"^decoder_norm\.", f"pred_head.transforms.0.{arguments.get('decoder_depth')}.")
    state = _rename(fuse_qkv(state) if fused else state, (norm, *PYSLOWFAST_NAMES))
    return {"model_state": state, "arguments": said}


def to_videomae_hf(
    weights: Weights,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return tensors, config.json and preprocessor_config.json of a Hugging Face VideoMAE.

    Key biases are left out: they add the same number to all attention scores of a query, which
    softmax does not see.

    Raises:
        ValueError: VideoMAE has no such model; the message says why.
    """
    arguments, state = weights.arguments, weights.as_stored()
    reasons = []
    if arguments["cls_embed"]:
        reasons.append("it has a class token, VideoMAE has none")
    widths = {"pos_embed": "embed_dim"}
    widths |= {"decoder_pos_embed": "decoder_embed_dim"} if weights.has_decoder else {}
    for name, width in widths.items():
        table = sincos_pos_embed(math.prod(weights.grid), arguments[width])
        if state.pop(name, None) is None or weights.state[name].shape[1:] != table.shape:
            reasons.append(f"its {name} is not joint, VideoMAE's is a fixed sine-cosine table")
            continue
        tolerance = max(1e-5, weights.rounding(name))
        if not torch.allclose(weights.state[name][0].float(), table, rtol=0, atol=tolerance):
            reasons.append(f"its {name} is not VideoMAE's fixed sine-cosine table")
    if weights.has_decoder:
        if arguments["pred_t_dim"] != arguments["num_frames"]:
            reasons.append("it predicts some of the frames of a patch, VideoMAE predicts all")
        if not arguments["norm_pix_loss"] and not weights.predicts_unit_pixels:
            per_channel = torch.ones(arguments["in_chans"], dtype=torch.float64)
            state |= fold_output(weights.state, STD * per_channel, MEAN * per_channel)
        if state.pop("decoder_embed.bias").any():
            reasons.append("its decoder_embed has a bias, VideoMAE's has none")
        if arguments["no_qkv_bias"] != ("decoder_blocks.0.attn.q.bias" not in state):
            reasons.append("its encoder and decoder do not both have biases of q and v")
    _refuse("VideoMAE", reasons, weights.has_decoder)
    norm = (r"^norm\.", "fc_norm." if weights.has_head else "videomae.layernorm.")
    state = {k: v for k, v in state.items() if not k.endswith(".attn.k.bias")}
    state = _rename(state, (norm, *VIDEOMAE_NAMES))
    return state, _hf_config(weights), _hf_preprocessor(weights)


def _hf_config(weights: Weights) -> dict[str, Any]:
    arguments, state = weights.arguments, weights.state
    architecture = "VideoMAEModel"
    config = {
        "model_type": "videomae",
        "image_size": arguments["img_size"],
        "patch_size": arguments["patch_size"],
        "num_channels": arguments["in_chans"],
        "num_frames": arguments["num_frames"],
        "tubelet_size": arguments["t_patch_size"],
        "hidden_size": arguments["embed_dim"],
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "intermediate_size": len(state["blocks.0.mlp.fc1.weight"]),
        "hidden_act": "gelu",
        "layer_norm_eps": arguments["layer_norm_eps"],
        "qkv_bias": not arguments["no_qkv_bias"],  # its name in older versions
        "qv_bias": not arguments["no_qkv_bias"],
        "use_mean_pooling": weights.has_head or "norm.weight" not in state,
    }
    if weights.has_head:
        architecture = "VideoMAEForVideoClassification"
        labels = [f"LABEL_{i}" for i in range(arguments["num_classes"])]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    if weights.has_decoder:
        architecture = "VideoMAEForPreTraining"
        config |= {
            "decoder_hidden_size": arguments["decoder_embed_dim"],
            "decoder_num_hidden_layers": arguments["decoder_depth"],
            "decoder_num_attention_heads": arguments["decoder_num_heads"],
            "decoder_intermediate_size": len(state["decoder_blocks.0.mlp.fc1.weight"]),
            "norm_pix_loss": arguments["norm_pix_loss"],
        }
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
        "image_mean": weights.mean or (MEAN,) * 3,
        "image_std": weights.std or (STD,) * 3,
    }


def write(weights: Weights, path: str, to: str) -> None:
    """Write a checkpoint in one of FORMATS; path is a folder for videomae-hf, else a file.

    Raises:
        UserError: the file that the weights come from does not record the size of its clips.
        ValueError: that project has no such model; the message says why.
        OSError: the file cannot be written.
    """
    weights.refuse_doubt()
    if to == "videomae-hf":
        state, config, preprocessor = to_videomae_hf(weights)
        contents = {
            "config.json": json.dumps(config, indent=2).encode(),
            "preprocessor_config.json": json.dumps(preprocessor, indent=2).encode(),
            "model.safetensors": safetensors_bytes(state, _metadata(weights)),
        }
        make_dirs(path)
        for name, content in contents.items():
            write_atomically(os.path.join(path, name), lambda file, c=content: file.write(c))
    elif to == "safetensors":
        content = to_safetensors(weights)
        write_atomically(path, lambda file: file.write(content))
    else:
        is_ours = to == "mae_st"
        checkpoint = (
            to_mae_st(weights) if is_ours else to_pyslowfast(weights, to == "pyslowfast-fused")
        )
        write_atomically(path, lambda file: torch.save(checkpoint, file))


def to_safetensors(weights: Weights) -> bytes:
    """Return a .safetensors file with our names; its header rebuilds the model."""
    weights = with_our_normalisation(weights)
    return safetensors_bytes(_own_storage(weights.as_stored()), _metadata(weights))


def _metadata(weights: Weights) -> dict[str, str]:
    """Describe the model in a .safetensors header; "format" is what transformers asks for."""
    mean, std = weights.mean or (MEAN,) * 3, weights.std or (STD,) * 3
    said = {"arguments": weights.arguments, "image_mean": mean, "image_std": std}
    return {"format": "pt", METADATA: json.dumps(said)}


def _rename(state: dict[str, Tensor], names: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for ours, tensor in state.items():
        name = ours
        for pattern, theirs in names:
            name = re.sub(pattern, theirs, name)
        renamed[name] = tensor
    return _own_storage(renamed)


def _own_storage(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy views, which files would store with all of what they view, and what is shared."""
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
    # only the command line uses models, which this folder does not know otherwise
    from models_mae import MaskedAutoencoderViT
    from models_vit import VisionTransformer

    with torch.device("meta"):
        if weights.has_decoder:
            model = MaskedAutoencoderViT(**weights.autoencoder_arguments())
        else:
            model = VisionTransformer(**weights.classifier_arguments())
    optional = () if weights.has_head else ("head.",)
    if to == "videomae-hf" and not any(name.startswith("norm.") for name in weights.state):
        optional = (*optional, "norm.")  # theirs without a head may lack it: use_mean_pooling
    lacking = [k for k in model.state_dict() if k not in weights.state]
    lacking = [k for k in lacking if not optional or not k.startswith(optional)]
    if lacking:
        rest = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
        raise UserError(
            f"{weights.path} lacks {len(lacking)} weights of its model "
            f"({', '.join(lacking[:4])}{rest}) and would be written as if whole"
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
    """Join q, k and v of every block to one qkv: the other way round than our_names."""
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
