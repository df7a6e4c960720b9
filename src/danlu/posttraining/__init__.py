"""What makes a trained model better, or smaller: alignment, reward models, distillation."""
