"""Every setting of a run: `schema` declares, `load` overrides, saves and loads, `validate` cross-checks."""
