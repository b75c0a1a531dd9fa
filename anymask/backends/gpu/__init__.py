"""What the GPU backends share: arguments made of a BlockMask, the machine's target, the delta pass and the dq pass."""
