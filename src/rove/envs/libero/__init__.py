"""LIBERO's 130 tasks, and LIBERO-PRO's perturbed ones: the C engine in batch, no OpenGL, no stock environment."""
