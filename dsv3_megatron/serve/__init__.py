"""Commands that let a trained model answer: `dsv3 chat`, `dsv3 generate`, `dsv3 serve`; and what loads it for them."""
