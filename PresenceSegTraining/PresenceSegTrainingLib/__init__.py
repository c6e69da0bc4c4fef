"""The library of the PresenceSegTraining module: presence, losses, sampling, training, evaluation, the command line."""
