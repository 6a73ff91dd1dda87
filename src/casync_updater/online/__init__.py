"""Online detection: wake-ups, interfaces, probes and the state machine that judges them."""
