"""structmat.nn: structured layers for torch, in the place of ``nn.Linear``.

``StructuredLinear`` is the layer. Needs torch; ``import structmat`` does not load it.
"""

from structmat.nn import huggingface as _huggingface
from structmat.nn.calibration import Calibration as Calibration
from structmat.nn.calibration import calibrate as calibrate
from structmat.nn.conversion import convert as convert
from structmat.nn.conversion import dequantize as dequantize
from structmat.nn.densify import densify as densify
from structmat.nn.layer import ProjectionSummary as ProjectionSummary
from structmat.nn.layer import StructuredLinear as StructuredLinear
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
from structmat.nn.storage import load as load
from structmat.nn.storage import save as save
from structmat.nn.weight import StructuredWeight as StructuredWeight

_huggingface.register()
