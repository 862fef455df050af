"""One file, one loss of routers; one line here registers it."""

import upcycle.finetune.router_losses.adaptive_balance
import upcycle.finetune.router_losses.balance
import upcycle.finetune.router_losses.cv2
import upcycle.finetune.router_losses.entropy
import upcycle.finetune.router_losses.erc
import upcycle.finetune.router_losses.labels
import upcycle.finetune.router_losses.separation
import upcycle.finetune.router_losses.z_loss
from upcycle.finetune.router_losses.base import ROUTER_LOSSES

__all__ = ["ROUTER_LOSSES"]
