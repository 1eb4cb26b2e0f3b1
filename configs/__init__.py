"""What a run is: typed, strict settings. No torch, no ray, nothing heavy."""
