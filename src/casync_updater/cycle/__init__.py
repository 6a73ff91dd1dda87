"""The cycle: check, plan, build, verify, commit, act, mirror."""
