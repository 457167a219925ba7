"""Forward and backward passes where weights are sharded: every rank must make as many, in one order.

FSDP2 and ZeRO-3 gather weights inside each pass, so ranks whose batches fall into unlike numbers of passes, or of
which one runs the vision tower while another does not, would wait for each other for ever.
"""

import numpy as np
import torch
from accelerate.utils import DistributedType

from modeling_gve import PreparedItem


SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def align_passes(groups, places, accelerator, processor):
    """Sort a batch's passes by what they run, and add blank ones until every rank has as many of each kind.

    Args:
        groups (list of `dict`): model inputs of each pass.
        places (`torch.LongTensor` of shape `(M,)`): rows of the items in the passes' concatenated outputs.
        accelerator (`Accelerator`): the ranks.
        processor (`GVEProcessor`): makes blank inputs.

    Returns:
        `tuple` of groups and places as before. A blank pass has one row, to which no place points: its gradient is 0.
    """
    kinds = [_kind(group) for group in groups]
    counts = torch.tensor([[kinds.count(kind) for kind in range(4)]], device=accelerator.device)
    needed = accelerator.gather(counts).amax(0).tolist()
    sizes = [len(group["input_ids"]) for group in groups]
    starts = np.cumsum([0, *sizes])
    aligned, rows, end = [], np.empty(starts[-1], dtype=np.int64), 0
    for kind in range(4):
        mine = [number for number, each in enumerate(kinds) if each == kind]
        for number in mine:
            aligned.append(groups[number])
            rows[starts[number] : starts[number + 1]] = np.arange(end, end + sizes[number])
            end += sizes[number]
        blanks = needed[kind] - len(mine)
        aligned += [_blank(kind, processor) for _ in range(blanks)]
        end += blanks
    return aligned, torch.from_numpy(rows)[places]


def _kind(group):
    return ("pixel_values" in group) + 2 * ("pixel_values_videos" in group)


def _blank(kind, processor):
    item = PreparedItem("", "")
    if kind & 1:
        side = 2 * processor.image_processor.patch_size * processor.image_processor.merge_size
        item.image = np.zeros((side, side, 3), dtype=np.uint8)
    if kind & 2:
        vision = processor.video_processor
        side = 2 * vision.patch_size * vision.merge_size
        item.frames = np.zeros((vision.temporal_patch_size, side, side, 3), dtype=np.uint8)
        item.times = np.arange(vision.temporal_patch_size, dtype=np.float64)
    return dict(processor.collate([item]))
