"""Objectives as pure functions of tensors: one value for each example, reduced elsewhere, once."""
