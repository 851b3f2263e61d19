"""`megarl study`: runs that differ in one thing each, from the same start, compared with intervals over seeds."""
