"""What a pre-training recipe is over its tokens: its schedules shown, and the ranks that its batch ramp can use."""
