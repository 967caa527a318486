"""Studies, benchmarks and demonstrations: commands over the finished product; nothing imports them."""
