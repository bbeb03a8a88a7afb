"""Networks: shared convolutions, private batch norm per resolution."""

from rsfast.models import official
from rsfast.models.rsnet import ARCHITECTURES, RSNet, create_model

__all__ = ["ARCHITECTURES", "RSNet", "create_model", "official"]
