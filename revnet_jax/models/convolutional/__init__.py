"""ResNets, RevNets and i-RevNets for images (Gomez et al. 2017, Jacobsen et al. 2018)."""
