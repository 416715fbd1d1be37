// The search runs in a worker, which browsers do not start in a page opened from disk. There, this class takes the
// place of Worker and runs the worker's script in a hidden frame. The name tells Zensical not to add a script of the
// same purpose from another host.
if (location.protocol === "file:")
  window.Worker = class {
    constructor(url) {
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.terminate = () => frame.remove();
      const loaded = new Promise((resolve, reject) => {
        frame.onload = () => {
          const scope = frame.contentWindow;
          scope.postMessage = (data) => setTimeout(() => this.onmessage?.({ data }));
          const script = scope.document.createElement("script");
          script.onload = () => resolve(scope);
          script.onerror = reject;
          script.src = url;
          scope.document.head.append(script);
        };
      });
      this.postMessage = (data) =>
        loaded.then(
          (scope) => scope.onmessage({ data: structuredClone(data) }),
          (event) => this.onerror?.(event),
        );
      document.documentElement.append(frame);
    }
  };
