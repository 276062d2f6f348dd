"""What a training step costs on accelerators: from shapes, data sheets and layouts, before anything is measured."""
