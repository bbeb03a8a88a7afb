"""Networks: shared convolutions, private batch norm per resolution."""

from rsfast.models.rsnet import ARCHITECTURES, RSNet, check_resolutions, create_model

__all__ = ["ARCHITECTURES", "RSNet", "check_resolutions", "create_model"]
