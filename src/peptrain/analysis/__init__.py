"""Learning dynamics: what training does to rank, condition and spectra of every matrix."""
