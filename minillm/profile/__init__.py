"""Profiles: a small linear map, fitted once per model, that predicts what each token will be worth to each head."""
