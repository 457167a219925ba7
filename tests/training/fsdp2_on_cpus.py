"""`pyramid.py` under FSDP2 on CPU ranks, which torch can and Accelerate does not ask for."""

import os
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from training.pyramid import main


ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
init = AcceleratorState.__init__


def init_as_on_gpus(self, *args, fsdp_plugin=None, **kwargs):
    """What Accelerate does on GPUs only."""
    init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    AcceleratorState.__init__ = init_as_on_gpus
    del FSDPModule.set_requires_gradient_sync  # without it each rank would keep the gradients of the whole model
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo abort one exit in twenty
