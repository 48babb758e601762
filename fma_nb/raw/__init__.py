"""How music gets here: FMA's downloads, and the synthetic set."""
