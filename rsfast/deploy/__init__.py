"""Running an exported network, without PyTorch."""

from rsfast.deploy.manifest import Manifest
from rsfast.deploy.network import Network, load

__all__ = ["Manifest", "Network", "load"]
