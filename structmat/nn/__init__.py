"""structmat.nn: structured layers for torch, in the place of ``nn.Linear``.

``StructuredLinear`` is the layer. Needs torch; ``import structmat`` does not load it.
"""

from structmat.nn import huggingface as _huggingface
from structmat.nn.attention import UnfusedAttention as UnfusedAttention
from structmat.nn.attention import unfuse_attention as unfuse_attention
from structmat.nn.calibration import Calibration as Calibration
from structmat.nn.calibration import calibrate as calibrate
from structmat.nn.checkpoint import apply_structure as apply_structure
from structmat.nn.checkpoint import full_state_dict as full_state_dict
from structmat.nn.checkpoint import load_sharded as load_sharded
from structmat.nn.checkpoint import save_sharded as save_sharded
from structmat.nn.conversion import convert as convert
from structmat.nn.densify import densify as densify
from structmat.nn.densify import dequantize as dequantize
from structmat.nn.layer import ProjectionSummary as ProjectionSummary
from structmat.nn.layer import StructuredLinear as StructuredLinear
from structmat.nn.normalization import NormalizedLinear as NormalizedLinear
from structmat.nn.normalization import remove_weight_norm as remove_weight_norm
from structmat.nn.normalization import weight_norm as weight_norm
from structmat.nn.parallel import parallelize as parallelize
from structmat.nn.peft import lora as lora
from structmat.nn.plan import Plan as Plan
from structmat.nn.plan import plan as plan
from structmat.nn.report import Report as Report
from structmat.nn.report import report as report
from structmat.nn.scaling import CoordinateCheck as CoordinateCheck
from structmat.nn.scaling import coordinate_check as coordinate_check
from structmat.nn.scaling import initialize as initialize
from structmat.nn.scaling import multipliers as multipliers
from structmat.nn.scaling import param_groups as param_groups
from structmat.nn.sequential import convert_sequentially as convert_sequentially
from structmat.nn.sharding import shard_placement as shard_placement
from structmat.nn.storage import load as load
from structmat.nn.storage import save as save
from structmat.nn.weight import StructuredWeight as StructuredWeight

_huggingface.register()
