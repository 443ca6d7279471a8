"""A step of training: the loop, gradients, what is not finite, optimizers, averages."""
