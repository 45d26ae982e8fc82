"""The paper's experiments, and more of their kind: runs, tables, figures."""
