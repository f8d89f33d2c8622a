"""Fast forms of the maths in `dmc.functional`, each tested against it."""
