"""What ties the controller to the world: the store, the disk, and the messages of the contract."""
