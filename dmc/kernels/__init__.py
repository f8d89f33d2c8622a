"""Fast implementations of the maths in `dmc.functional`, each tested against it."""
