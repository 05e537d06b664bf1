"""The study: which objective works in which setting, on a model small enough to repeat everything."""
