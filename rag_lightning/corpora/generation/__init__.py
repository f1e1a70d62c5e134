"""Data sets whose answer is a text to write, read as questions and passages: any of them trains a RAG model.

``prepared`` says what a reader of a data set returns, and keeps it as files of the package's own form.
"""
