"""The 25-object put-on-plate benchmark of RL4VLA and RLinf, on ManiSkill."""
