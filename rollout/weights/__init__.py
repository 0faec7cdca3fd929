"""Getting a trainer's weights into running engines."""

from rollout.weights.publish import publish_weights, serialize_weights

__all__ = ["publish_weights", "serialize_weights"]
