"""Write the features of videos by a frozen encoder to files.

    python main_features.py --path_to_data_dir /data/k400 --finetune checkpoint-00199.pth

See FEATURES.md.
"""

from typing import Any

import torch

import models_mae
import models_vit
from util import run
from util.formats import Weights
from util.video_vit import Encoder
from util.weights import apply_weights


def load_model(weights: Weights, **arguments: Any) -> Encoder:
    """Rebuild the model of a checkpoint for its features, on the CPU and in evaluation mode.

    It is a classifier if the file has a head, else an autoencoder; one without a decoder gets one
    of no blocks. The file also sets the model's `sampling_rate` and `sampling`.

    Args:
        weights: see util.weights.read_weights.
        arguments: arguments of the constructor that replace the file's.

    Raises:
        UserError: weights are missing or do not fit the arguments.
    """
    is_whole = weights.has_head or weights.has_decoder
    if not is_whole:
        fields = weights.arguments | arguments
        pred_t_dim = fields["num_frames"] // fields["t_patch_size"]
        arguments = {"decoder_depth": 0, "pred_t_dim": pred_t_dim} | arguments
    # drawing weights that the file replaces would take seconds
    with run.usage_errors(), torch.device("meta" if is_whole else "cpu"):
        if weights.has_head:
            model = models_vit.VisionTransformer(**weights.classifier_arguments(**arguments))
        else:
            model = models_mae.MaskedAutoencoderViT(**weights.autoencoder_arguments(**arguments))
    apply_weights(model, weights, keep_head=True, keep_decoder=weights.has_decoder)
    return model.eval()
