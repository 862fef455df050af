"""Several dense models as the experts of one: what may be asked, and the models behind it."""
