"""Pure modules: no IO, no printing, no optimizers, no distribution."""
