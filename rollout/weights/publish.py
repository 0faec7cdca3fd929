"""Publishing: a model's weights, as one safetensors file, to every engine that serves it.

The engine copies them in place between two steps; requests that run go on, and tokens sampled later carry
the version.
"""

from __future__ import annotations

from collections.abc import Sequence

from safetensors.torch import save

from agentserve.models import Decoder
from agentserve.sdk import Client


def serialize_weights(model: Decoder) -> bytes:
    """The model's tensors under their Hugging Face names, in its own dtype, as the bytes of a safetensors
    file.
    """
    # The views share the storage of fused weights; a file needs each tensor by itself.
    return save({name: view.detach().cpu().clone() for name, view in model.checkpoint_views().items()})


def publish_weights(targets: Client | str | Sequence[Client | str], model: Decoder, version: int) -> int:
    """Put the model's weights into running engines, and return the number of bytes sent to each.

    Args:
        targets: one engine or several, as clients or URLs.
        version: greater than each engine's current version.

    Raises:
        ValueError: the version does not grow; nothing was sent to any engine.
        AgentserveError: an engine refused or could not be reached; those before it have the new weights.
    """
    listed = [targets] if isinstance(targets, Client | str) else list(targets)
    opened = [Client(each) for each in listed if isinstance(each, str)]
    waiting = iter(opened)
    clients = [next(waiting) if isinstance(each, str) else each for each in listed]
    try:
        for client in clients:
            current = client.health().weight_version
            if version <= current:
                raise ValueError(f"version {version} must be greater than {current}, which {client.url} serves")
        data = serialize_weights(model)
        for client in clients:
            client.update_weights(version, data)
        return len(data)
    finally:
        for client in opened:
            client.close()
