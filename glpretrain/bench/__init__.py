"""What a recipe costs on a machine, beside the run itself: the machine's peak, a plan of memory, and an official code for comparison."""
