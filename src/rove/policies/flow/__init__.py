"""Flow-matching VLAs: SmolVLA, π0 and π0.5."""

from rove.policies.flow.vla import FlowVLA as FlowVLA
